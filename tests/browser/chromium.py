"""Where Chromium is on this machine, and how it is started."""

import shutil

PATHS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
WHY_NOT = "no Chromium on this machine: apt-get install -y chromium"
# As root there is no sandbox; and it asks for nothing by itself.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
