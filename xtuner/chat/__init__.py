"""Chat sessions, in a terminal and on a web page."""
