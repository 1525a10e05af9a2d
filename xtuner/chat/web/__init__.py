"""The web page of `xtuner chat --web`."""
