"""The TCP ports of a server: free ones found, taken ones named, before it starts."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from rekd_deploy.errors import ServerError
from rekd_deploy.server.flags import PORT_FLAGS


def settled_ports(wanted: Mapping[str, int], hosts: Mapping[str, str]) -> dict[str, int]:
    """The ports to use: free ones for 0, the others checked.

    Args:
        wanted: by interface: 'grpc', 'http', 'metrics'.
        hosts: the address of each.

    Raises:
        ServerError: names every port that is taken and the flag that changes it.
    """
    mistakes, ports, held = [], {}, []
    for interface, port in wanted.items():
        flag = PORT_FLAGS[interface]
        if not 0 <= port <= 65535:
            mistakes.append(f"port {port} is outside 0..65535; change {flag}")
            continue
        if port and port in ports.values():
            mistakes.append(f"port {port} is given twice; change {flag}")
            continue
        listener = socket.socket()
        held.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton: an old connection may linger
        try:
            listener.bind((hosts[interface], port))
            listener.listen(1)
        except OSError as error:
            mistakes.append(f"port {port} cannot be used ({error.strerror}); choose another with {flag} (0: any free)")
            continue
        ports[interface] = listener.getsockname()[1]
    for listener in held:
        listener.close()
    if mistakes:
        raise ServerError("; ".join(mistakes))
    return ports
