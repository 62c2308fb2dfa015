"""A small TCP proxy, with TLS where asked: counts connections, cuts them, ends encryption before a plain server."""

import contextlib
import socket
import ssl
import threading
from socketserver import ThreadingTCPServer


class Proxy(ThreadingTCPServer):
    """Forwards 127.0.0.1:<free port> to a server's port on this machine, with TLS towards the client, or plain."""

    daemon_threads, block_on_close = True, False

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), None)
        self.port, self.connections, self._open = self.server_address[1], 0, []
        self._target, self._context = port, context

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.cut()

    def cut(self) -> None:
        for side in [*self._open]:
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def finish_request(self, client: socket.socket, address) -> None:
        self.connections += 1
        with contextlib.suppress(OSError):
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            self._forward(server, client)

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


def server_context(authority, name="127.0.0.1"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    context.set_alpn_protocols(("h2", "http/1.1"))
    return context
