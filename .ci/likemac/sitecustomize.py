"""For PYTHONPATH: take away from Linux what macOS does not have."""

import errno
import os
import select
import selectors
import socket

for name in dir(select):
    if name == "epoll" or name.endswith("RDHUP"):
        delattr(select, name)
# This may have been imported already, and have found epoll.
selectors.DefaultSelector = selectors.PollSelector

shutdown_on_linux = socket.socket.shutdown


def shutdown(self, how):
    """Fail where this socket listens."""
    if self.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    shutdown_on_linux(self, how)


socket.socket.shutdown = shutdown
