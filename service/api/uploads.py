"""What gateway and worker share when they read an upload."""

# A client that sends nothing for this long is considered gone.
PIECE_TIMEOUT_S = 60.0
# A file may begin with it; it is not part of the first line.
BOM = b"\xef\xbb\xbf"
