"""A small TCP proxy, with TLS where asked: counts connections, cuts them, ends encryption before a plain server."""

import contextlib
import socket
import ssl
import threading


class Proxy:
    """Forwards 127.0.0.1:<free port> to a server's port on this machine, with TLS towards the client, or plain."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self._target, self._context = port, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection that is open now."""
        for side in [*self._open]:
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _start(target, *arguments) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        try:
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        self._open += [client, server]
        self._start(self._forward, client, server)
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
    """TLS of a server that speaks both protocols, with a certificate of the authority (trustme.CA)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    context.set_alpn_protocols(("h2", "http/1.1"))
    return context
