"""The old name of eval.py; whoever imports `evaluate` gets the installed package of that name, as if this were gone."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.exit("error: evaluate.py is called eval.py now: python eval.py, with the same settings")

here = str(Path(__file__).resolve().parent)
elsewhere = [path for path in sys.path if str(Path(path or ".").resolve()) != here]
spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
if spec is None:
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
sys.modules[__name__] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
