"""An S3 server in this process whose networks can be slow, silent or cut, or ignore conditions."""

import logging
import socket
import threading
import time

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
logging.getLogger("werkzeug").setLevel(logging.ERROR)


class Network:
    """One connection to the server, with its own faults; all networks of a process reach the same objects.

    careless: create-if-absent is handled as a plain put. silent: while set, requests are accepted and never answered.
    delay: seconds before each answer. cut: names, or parts of names, whose next put is done but its answer is lost.
    seen: called with method and path before each request is handled.
    """

    def __init__(self):
        self.careless, self.delay, self.silent, self.cut = False, 0.0, threading.Event(), []
        self.seen = lambda method, path: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.silent.is_set():
            while self.silent.is_set():
                time.sleep(0.02)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # the request is lost
            start_response("503 Service Unavailable", [])
            return []
        time.sleep(self.delay)
        self.seen(method, path)
        if self.careless:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        out = self._app(environ, start_response)
        if method == "PUT" and (hit := next((word for word in self.cut if word in path), None)):
            self.cut.remove(hit)
            b"".join(out)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return out

    def close(self):
        self.silent.clear()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def client(network):
    """Return a separate client, with which a test inspects the objects."""
    return boto3.client(
        "s3",
        endpoint_url=network.url,
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",  # noqa: S106
        region_name="us-east-1",
    )
