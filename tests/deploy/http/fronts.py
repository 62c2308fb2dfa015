"""The HTTP front for the tests: before a stand-in for Triton, or listening on a port."""

import http.client
import json
from contextlib import closing
from types import SimpleNamespace

from test_client import FakeServer

from rekd_deploy.http.front import Front
from rekd_deploy.http.limits import Limits

KEY = "0123456789abcdef"


class Stub(FakeServer):
    """The stand-in for Triton of the client's tests, which serves 'rekd' alone; ``down``: what it raises instead."""

    down = None

    def model_versions(self, model, timeout):
        if self.down is not None:
            raise self.down
        return super().model_versions(model, timeout) if model == "rekd" else []

    def infer(self, request):
        if self.down is not None:
            raise self.down
        return super().infer(request)


class Listening(Front):
    """A front on a free port of this machine; ``start`` it with Triton's address."""

    def __init__(self, limits=None, **environment):
        super().__init__(0, exposed=False, limits=limits or Limits(), environment=environment)

    def send(self, method, path, body=None, **headers):
        """Status, headers and content of an answer; JSON is read."""
        with closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)) as connection:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if isinstance(body, (dict, list)):
                body, headers = json.dumps(body), {"Content-Type": "application/json"} | headers
            connection.request(method, path, body, headers)
            return answer_of(connection.getresponse())


def answer_of(response):
    content = response.read()
    if "json" in (response.headers["content-type"] or ""):
        content = json.loads(content)
    return SimpleNamespace(status=response.status, headers=response.headers, content=content)


def form(*files, **fields):
    """A multipart body and its Content-Type."""
    parts = [b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value.encode())
             for name, value in fields.items()]
    parts += [b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n' % file
              for file in files]
    return b"".join(parts) + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
