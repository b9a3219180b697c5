import os, runpy, sys

sys.modules["fcntl"] = None
sys.path.insert(0, os.environ["DREAMER"])
sys.argv[0] = os.environ["DREAMER"] + "/dreamer.py"
runpy.run_path(sys.argv[0], run_name="__main__")
