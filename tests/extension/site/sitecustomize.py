"""Registers the modules that EXTENSIONS names, in every process whose PYTHONPATH has this folder."""

import importlib
import os

for name in filter(None, os.environ.get("EXTENSIONS", "").split(",")):
    importlib.import_module(name).register()
