import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.metrics import weights
from lightning_tdisent.metrics.weights import KNOWN, cache_folder, fetch, load, locate

FILE = KNOWN["inception"].file


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def content() -> bytes:
    stream = io.BytesIO()
    torch.save({"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}, stream)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path, content):
    path = tmp_path / "mirror.pth"
    path.write_bytes(content)
    return path


@pytest.fixture
def server(content):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/weights.pth", "/short.pth"):
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return self.wfile.write(content[:-9] if self.path == "/short.pth" else content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_the_known_digest_agrees_with_the_name_of_the_file():
    for known in KNOWN.values():
        assert len(known.sha256) == 64
        assert known.url.endswith(known.file)
    assert KNOWN["inception"].sha256[:8] in FILE


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TDISENT_CACHE", "~/weights")
    assert cache_folder() == tmp_path / "weights"
    monkeypatch.delenv("TDISENT_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "lightning_tdisent"


def test_a_url_is_no_cache(monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", "s3://bucket/cache")
    with pytest.raises(InputError, match="TDISENT_CACHE: s3://bucket/cache: must be a folder on this machine"):
        weights.cache_folder()


def test_what_is_not_there_is_asked_for_with_the_command_that_brings_it(cache):
    said = r"fetch inception; or .* --weights FILE", r"Give another file, or none to use the one of .* fetch inception"
    for path, words in zip((None, cache / "mine.pth"), said, strict=True):
        with pytest.raises(InputError, match=words) as caught:
            locate("inception", path)
        assert str(path or cache / FILE) in str(caught.value)
    with pytest.raises(InputError, match=r"'incepton'.*Did you mean 'inception'"):
        locate("incepton")


def test_fetched_from_a_file_it_is_found_and_read(file, content, cache):
    steps = []
    found = fetch("inception", file, digest(content), progress=lambda done, total: steps.append((done, total)))
    assert found == cache / FILE == locate("inception", sha256=digest(content))
    assert steps[-1] == (len(content), len(content))
    state = load("inception", sha256=digest(content).upper())
    assert torch.equal(state["fc.weight"], torch.arange(6.0).view(2, 3))
    assert torch.equal(load("inception", file, digest(content))["fc.bias"], torch.ones(2))
    assert os.listdir(cache) == [FILE]


def test_one_that_is_there_is_left_alone_and_a_damaged_one_replaced(file, content, cache):
    target = fetch("inception", file, digest(content))
    before = target.stat().st_mtime_ns
    assert fetch("inception", "/not/read", digest(content)).stat().st_mtime_ns == before
    target.write_bytes(content[:-1])
    assert fetch("inception", file, digest(content)).read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_another_file_is_refused_with_both_digests_before_it_is_read(file, content, cache, damage, monkeypatch):
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"flipped": flipped, "truncated": content[:-7], "empty": b""}[damage]
    file.write_bytes(damaged)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read before it was checked"))
    for refusing in (
        lambda: fetch("inception", file, digest(content)),
        lambda: locate("inception", file, digest(content)),
        lambda: load("inception", file, digest(content)),
    ):
        with pytest.raises(InputError, match="another file, or damaged") as caught:
            refusing()
        assert digest(damaged) in str(caught.value)
        assert digest(content) in str(caught.value)
    assert not cache.exists() or os.listdir(cache) == []
    with pytest.raises(InputError, match=KNOWN["inception"].sha256):
        load("inception", file)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_never_does(tmp_path, zipped):
    trap, file = tmp_path / "trap", tmp_path / "evil.pth"
    torch.save({"fc.weight": Malicious(str(trap))}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="expected"):
        load("inception", file)
    with pytest.raises(InputError, match=r"evil\.pth cannot be read as tensors alone"):
        load("inception", file, digest(file.read_bytes()))
    assert not trap.exists()


def test_what_holds_no_tensors_is_refused(tmp_path, content):
    file = tmp_path / "odd.pth"
    for odd in ([torch.ones(2)], {"a": 1}):
        torch.save(odd, file)
        with pytest.raises(InputError, match="not tensors by name"):
            load("inception", file, digest(file.read_bytes()))
    file.write_bytes(content[:-200])
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load("inception", file, digest(content[:-200]))


def test_the_format_before_zip_is_read(tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"fc.bias": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(load("inception", file, digest(file.read_bytes()))["fc.bias"], torch.ones(2))


def test_fetched_over_http(server, content, cache):
    assert fetch("inception", f"{server}/weights.pth", digest(content)).read_bytes() == content
    (cache / FILE).unlink()
    with pytest.raises(InputError, match=r"cannot be read: Not Found.*fetch inception --source FILE"):
        fetch("inception", f"{server}/moved.pth", digest(content))
    with pytest.raises(InputError, match="another file, or damaged"):
        fetch("inception", f"{server}/short.pth", digest(content))
    assert os.listdir(cache) == []


def test_without_a_network_it_says_what_to_do(monkeypatch, cache):
    closed = "http://127.0.0.1:9/weights.pth"
    monkeypatch.setitem(weights.KNOWN, "inception", KNOWN["inception"]._replace(url=closed))
    with pytest.raises(InputError, match=r"127.0.0.1:9.* cannot be read: .*refused.*--source FILE"):
        fetch("inception")
    with pytest.raises(InputError, match="http"):
        fetch("inception", "s3://bucket/weights.pth")
    with pytest.raises(InputError, match=r"/no/such\.pth cannot be read: No such file"):
        fetch("inception", "/no/such.pth")
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_written_is_named(file, content, cache):
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(Halted, match="cannot be written: File exists"):
        fetch("inception", file, digest(content))


def test_importing_it_opens_nothing():
    program = "import socket; socket.socket.connect = None; import lightning_tdisent.metrics.weights"
    subprocess.run([sys.executable, "-c", program], check=True)
