"""Names the host for each Python process with this folder in PYTHONPATH, where hosts have no UTS namespace."""

import os
import socket

if "FLEET_HOSTNAME" in os.environ:
    socket.gethostname = lambda: os.environ["FLEET_HOSTNAME"]
