"""File systems that stand for object stores in tests."""

from fsspec.implementations.local import LocalFileSystem


class Careless(LocalFileSystem):
    """A store without exclusive creation."""

    protocol = "careless"

    def __init__(self, **_: object) -> None:
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].strip("/") if "://" in path else path


class Shared(Careless):
    """A store with what a fleet requires: a URL, and exclusive creation of files."""

    protocol = "shared"

    def pipe_file(self, path, value, mode="overwrite", **_):
        with self.open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)
