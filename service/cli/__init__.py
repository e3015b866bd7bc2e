"""The command line. `app.py` is the way in; every other file here is one group of its commands."""
