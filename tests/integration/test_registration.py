"""Anomalib finds our classes by their short names, in whatever order things are imported, and forgets them afterwards.

Everything runs in fresh virtual environments that see the running one's packages by path. The wheel (or an editable
install) of this checkout goes into them, so it does not matter how, or whether, the package is installed out here.
"""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import OUTSIDE, Environment, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STARTUP_FILES = {"anomalib_ot.pth", "anomalib_ot.start", "_anomalib_ot_startup.py"}
OUR_ENTRY_POINTS = {
    "anomalib.models": {
        "OTADetector": "anomalib_ot.integration.models.ota_detector:OTADetector",
        "SparseMDOD": "anomalib_ot.integration.models.sparse_mdod:SparseMDOD",
        "OTPrototypes": "anomalib_ot.integration.models.ot_prototypes:OTPrototypes",
    },
    "anomalib.data": {
        "CocoBoxes": "anomalib_ot.integration.data.coco_boxes:CocoBoxes",
        "MaskBoxes": "anomalib_ot.integration.data.mask_boxes:MaskBoxes",
        "SyntheticFabric": "anomalib_ot.integration.data.synthetic_fabric:SyntheticFabric",
        "SyntheticFabricBoxes": "anomalib_ot.integration.data.synthetic_fabric_boxes:SyntheticFabricBoxes",
        "SyntheticTray": "anomalib_ot.integration.data.synthetic_tray:SyntheticTray",
        "TianchiFabric": "anomalib_ot.integration.data.tianchi_fabric:TianchiFabric",
    },
    "console_scripts": {"anomalib-ot": "anomalib_ot.__main__:main"},
}


# --- packaging and what the hook costs ----------------------------------------------------------------------


def test_wheel_holds_startup_files_and_entry_points(wheel):
    from configparser import ConfigParser

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        at_root = {name for name in names if "/" not in name}
        declared = ConfigParser(delimiters="=")
        declared.optionxform = str
        declared.read_string(archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode())
        startup = {name: archive.read(name) for name in at_root}

    assert at_root == STARTUP_FILES
    assert {group: dict(declared[group]) for group in declared.sections()} == OUR_ENTRY_POINTS
    assert {name.split("/")[0] for name in names} - at_root == {"anomalib_ot", "anomalib_ot-0.2.0.dist-info"}
    assert all(content.isascii() for content in startup.values())
    assert startup["anomalib_ot.pth"].count(b"\n") == 1, "site runs a .pth line by line: one import line, no more"
    assert startup["anomalib_ot.start"].strip() == b"_anomalib_ot_startup:install"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_adds_one_module_to_start_up_and_uninstall_leaves_no_trace(tmp_path, wheel, kind):
    environment = Environment(tmp_path)
    files, modules = environment.files(), environment.modules_at_start()

    environment.install(*([wheel] if kind == "wheel" else ["-e", ROOT]))
    added = environment.modules_at_start() - modules
    code = "import anomalib_ot, sys; print(anomalib_ot.__file__, [type(f).__module__ for f in sys.meta_path])"
    answer = environment.ask(code)
    assert added == {"_anomalib_ot_startup"}
    assert answer.startswith(str(ROOT if kind == "editable" else environment.site))
    assert answer.count("_anomalib_ot_startup") == 1

    environment.pip("uninstall", "--yes", "anomalib-ot")
    assert environment.files() == files
    assert environment.modules_at_start() == modules


def test_root_import_loads_neither_torch_nor_anomalib(installed):
    loaded = installed.ask("import sys, anomalib_ot; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "anomalib_ot" in loaded
    assert not {"torch", "numpy", "anomalib", "lightning"} & set(loaded)


def test_install_is_idempotent(installed):
    code = """
import importlib, pathlib, pkgutil, sys, _anomalib_ot_startup as startup
line = pathlib.Path(startup.__file__).with_name("anomalib_ot.start").read_text().strip()
assert pkgutil.resolve_name(line) is startup.install  # as PEP 829 finds it, from Python 3.15
before = list(sys.meta_path)
startup.install(), importlib.reload(startup).install()
assert sys.meta_path == before
assert [type(finder).__module__ for finder in before].count("_anomalib_ot_startup") == 1
"""
    installed.ask(code)
    installed.ask(code, "-I")


# --- import orders and names: one process imports the heavy packages once, and forks for each scenario ------

DRIVER = """
import gc, io, json, os, sys, traceback, warnings
import cv2, FrEIA, imagecodecs, jsonargparse, kornia, lightning.pytorch, omegaconf, openvino, pandas, skimage  # heavy,
import sklearn.neighbors, sklearn.mixture, timm, torchvision  # and none of them imports Anomalib
import einops, platformdirs, requests, scipy.io, skimage.filters, skimage.measure, skimage.morphology
import skimage.segmentation, tifffile, torchvision.tv_tensors, torchmetrics.detection
gc.freeze()  # the children leave alone what is there
scenarios, check, report = json.load(sys.stdin)
outcomes = {}
for name, code in scenarios.items():
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        outcome = "passed"
        try:
            assert not {"anomalib.data", "anomalib_ot"} & set(sys.modules)
            warnings.simplefilter("error", RuntimeWarning)
            sys.stderr = io.StringIO()  # where the hook goes with what it must not raise
            exec(code, {})
            # Without Anomalib the module is whole before the hook runs: all is as if it had not been imported first.
            if not name.startswith("anomalib_ot.") or "anomalib" in sys.modules:
                exec(check, {})
            assert "RuntimeWarning: Anomalib" not in sys.stderr.getvalue(), sys.stderr.getvalue()
        except BaseException:
            outcome = traceback.format_exc()
        os.write(writer, outcome[-20_000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcomes[name] = pipe.read()
    os.waitpid(child, 0)
with open(report, "w") as file:
    json.dump(outcomes, file)
"""

# What must hold in the end, whatever came before. Lists come first: asking for an attribute would load the class.
CHECK = """
import anomalib.data, anomalib.models
from anomalib.models import AnomalibModule, list_models

def descendants(cls):
    return [name for child in cls.__subclasses__() for name in (child.__name__, *descendants(child))]

for name in ("CocoBoxes", "MaskBoxes", "SyntheticFabric", "SyntheticFabricBoxes", "SyntheticTray", "TianchiFabric"):
    assert descendants(anomalib.data.AnomalibDataModule).count(name) == 1, name
assert [cls.__name__ for cls in AnomalibModule.__subclasses__()].count("OTPrototypes") == 1
assert {"OTPrototypes", "Padim", "Patchcore"} <= list_models("pascal")
assert "o_t_prototypes" in list_models()
import anomalib_ot
assert anomalib.models.OTPrototypes is anomalib_ot.OTPrototypes
assert anomalib.data.SyntheticFabric is anomalib_ot.SyntheticFabric
for module in (anomalib.models, anomalib.data):
    assert type(module.__loader__).__module__ != "_anomalib_ot_startup"
    try:
        module.NoSuchName
    except AttributeError as error:
        assert "NoSuchName" in str(error)
    else:
        raise AssertionError("an unknown attribute was found")
"""

# Names are resolved here, nothing is built: constructors (which may want weights or files) are replaced.
NAMES = """
import sys, torch, anomalib_ot
from anomalib.data import get_datamodule
from anomalib.models import UnknownModelError, get_model
model_class, data_class = anomalib_ot.OTPrototypes, anomalib_ot.SyntheticFabric
model_class.__init__ = lambda self: torch.nn.Module.__init__(self)
data_class.__init__ = lambda self: None
for name in ("ot_prototypes", "OTPrototypes", "o_t_prototypes"):
    assert type(get_model(name)) is model_class, name
for path in ("OTPrototypes", "anomalib.models.OTPrototypes", "anomalib_ot.OTPrototypes"):
    assert type(get_model({"class_path": path})) is model_class, path
for path in ("SyntheticFabric", "anomalib_ot.SyntheticFabric"):
    assert type(get_datamodule({"class_path": path})) is data_class, path
    assert type(get_datamodule({"data": {"class_path": path}})) is data_class, path
try:
    get_model({"class_path": "os.path.OTPrototypes"})
except UnknownModelError:
    pass
else:
    raise AssertionError("the hook opened Anomalib's allow-list to a foreign package")
"""

BROKEN = """
import sys, warnings
sys.path.append("broken")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import anomalib.models
(warning,) = [item for item in caught if issubclass(item.category, RuntimeWarning)]
assert "'Broken' (no_such_plugin:Broken)" in str(warning.message), warning.message
assert "No module named 'no_such_plugin'" in str(warning.message), warning.message
try:
    anomalib.models.Broken
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("a broken plugin was found")
"""

# A plugin that exits, an entry point without sense, and entry points that cannot be read: each is told once.
ODD = """
import sys, warnings
sys.path[:0] = ["odd"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import anomalib.models
said = [str(item.message) for item in caught if "Anomalib" in str(item.message)]
for words in (
    "'Exits' (exits:Exits) could not be loaded: SystemExit(",
    "'Senseless' (!!) could not be loaded",
    "of the distribution unreadable-plugin could not be read",
):
    assert sum(words in one for one in said) == 1, (words, said)
assert len(said) == 2, said  # one for each group
try:
    anomalib.models.Exits
except ImportError:
    pass
else:
    raise AssertionError("a plugin that exits was found")
"""

STRICT = """
import io, sys, warnings
sys.path[:0] = ["odd"]
warnings.simplefilter("error", RuntimeWarning)
import anomalib.models
assert sys.stderr.getvalue().count("RuntimeWarning: Anomalib") == 2, sys.stderr.getvalue()
sys.stderr = io.StringIO()
"""

NO_HOOK = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__module__ != "_anomalib_ot_startup"]
"""

SCENARIOS = {
    "anomalib.models first": "import anomalib.models",
    "anomalib.data alone": "import sys, anomalib.data\nassert 'anomalib.models' not in sys.modules",
    "anomalib.engine first": "import anomalib.engine",
    "anomalib.callbacks first": "import anomalib.callbacks",
    "anomalib.deploy first": "import anomalib.deploy",
    "anomalib.metrics first": "import anomalib.metrics",
    "anomalib.visualization first": "import anomalib.visualization",
    "the command line first": "import anomalib.cli.cli",
    "one model's module first": "import anomalib.models.image.padim",
    "package first, then Anomalib": "import anomalib_ot, anomalib.models",
    "name from the package": "from anomalib_ot import OTPrototypes, SyntheticFabric",
    "reload": "import importlib, anomalib.models as m, anomalib.data as d\nimportlib.reload(m), importlib.reload(d)",
    "find_spec, then import": (
        "from importlib.util import find_spec\nassert find_spec('anomalib.models') and find_spec('anomalib.data')"
    ),
    "installed late": (
        f"{NO_HOOK}\nimport anomalib.models\nassert not hasattr(anomalib.models, 'OTPrototypes')\n"
        "import _anomalib_ot_startup\n_anomalib_ot_startup.install()"
    ),
    "own command without the hook": (
        f"{NO_HOOK}\nfrom anomalib_ot.integration.cli import register_classes\n"
        f"register_classes(), register_classes()\n{NAMES}"
    ),
    "names": NAMES,
    "broken foreign plugin": BROKEN,
    "odd foreign plugins": ODD,
    "odd foreign plugins where warnings are errors": STRICT,
}
# A user may import any of our modules first; the hook then runs in the middle of that import.
SCENARIOS |= {
    f"{module} first": f"import {module}"
    for module in sorted(
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "src" / "anomalib_ot" / "integration").rglob("*.py")
    )
}


@pytest.fixture(scope="module")
def outcomes(installed):
    metadata = installed.folder / "broken" / "broken_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[anomalib.models]\nBroken = no_such_plugin:Broken\n")
    plugins = {
        "odd_plugin": "[anomalib.models]\nExits = exits:Exits\nSenseless = !!\n",
        "unreadable_plugin": "[anomalib.models]\nno equals sign\n\xff",
    }
    for name, text in plugins.items():
        metadata = installed.folder / "odd" / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        said = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        (metadata / "METADATA").write_text(said)
        (metadata / "entry_points.txt").write_bytes(text.encode("latin-1"))
    (installed.folder / "odd" / "exits.py").write_text("import sys\nsys.exit(3)\n")
    report = installed.folder / "outcomes.json"
    installed.ask(DRIVER, input=json.dumps([SCENARIOS, CHECK, str(report)]))
    return json.loads(report.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="the scenarios share one start by os.fork, which is safe on Linux")
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_import_order_ends_the_same(outcomes, name):
    assert outcomes[name] == "passed", outcomes[name]


# --- the real command, in a folder that is not the checkout -------------------------------------------------

ANOMALIB = ("-c", "from anomalib.cli.cli import main; main()")  # what the script `anomalib` holds
ARGUMENTS = ("train", "--model", "OTPrototypes", "--data", "SyntheticFabric", "--print_config")


@pytest.mark.cli
def test_anomalib_command_knows_both_short_names(installed):
    config = run(installed.python, *ANOMALIB, *ARGUMENTS, cwd=installed.folder).stdout
    assert "\n  class_path: anomalib_ot.OTPrototypes\n" in config
    assert "\n  class_path: anomalib_ot.SyntheticFabric\n" in config


@pytest.mark.cli
def test_own_command_works_where_the_hook_does_not_run(installed):
    paths = installed.ask("import sys; print(*sys.path, sep='\\n')").split()
    env = OUTSIDE | {"PYTHONPATH": os.pathsep.join(paths)}
    config = run(installed.python, "-S", "-m", "anomalib_ot", *ARGUMENTS, cwd=installed.folder, env=env).stdout
    assert "\n  class_path: anomalib_ot.OTPrototypes\n" in config
    assert "\n  class_path: anomalib_ot.SyntheticFabric\n" in config
    assert (installed.python.parent / "anomalib-ot").exists() or os.name == "nt"
