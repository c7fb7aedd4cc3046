"""The `anomalib` command for the tests, without the seconds that its imports take each time; the wheel, installed."""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from anomalib_ot.integration.data.synthetic_fabric import FabricFolder

# Does what the script `anomalib` does, or another one whose module is named, after the imports once per call: each call
# is a forked process of its own, with its own arguments, folder and environment. It ends as an interpreter does
# (exception hook, exit functions, status) but for taking Anomalib's thousands of objects down one by one, which costs
# as much as the command; for the same reason the collector of garbage leaves alone what is there before the fork.
SERVER = """
import atexit, gc, importlib, json, multiprocessing, os, sys, threading
import anomalib.cli.cli
for process in multiprocessing.active_children():  # an import has left one
    process.join()
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for stream, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
os.chdir(job["cwd"])
os.environ.update(job["env"])
sys.argv = [job["module"].partition(".")[0].replace("_", "-"), *job["words"]]
code = 0
try:
    importlib.import_module(job["module"]).main()
except SystemExit as end:
    code = end.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
NEVER = ("ANOMALIB_OT_TRACEBACK", "PYTHONWARNINGS")


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr: where a command that fails says why."""
        return (self.err.rstrip().splitlines() or [""])[-1]


class Anomalib:
    """Runs `anomalib` with words as a user would, in a folder of its own."""

    def __init__(self, folder: Path, python: Path = Path(sys.executable), **env: str) -> None:
        """Start nothing yet."""
        self.folder = folder
        self.python = python
        self.hub = folder / "hub"
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(self.hub)}  # nothing listens there
        self.env = {name: value for name, value in os.environ.items() if name not in NEVER} | ENV | nowhere | env
        self._server: subprocess.Popen | None = None
        self._calls = 0

    def __call__(self, *words: object, cwd: Path | None = None, module: str = "anomalib.cli.cli", **env: str) -> Done:
        """Run the command to its end in a process that has Anomalib imported already."""
        if not hasattr(os, "fork"):
            main = f"import sys; from {module} import main; sys.exit(main())"
            return self.fresh(*words, cwd=cwd, program=(str(self.python), "-c", main), **env)
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            command = [str(self.python), "-c", SERVER]
            self._server = subprocess.Popen(command, cwd=self.folder, env=self.env, text=True, **pipes)
        self._calls += 1
        out, err = (self.folder / f"{self._calls}.{stream}" for stream in ("out", "err"))
        job = {"module": module, "words": [str(word) for word in words], "cwd": str(cwd or self.folder), "env": env}
        self._server.stdin.write(json.dumps(job | {"out": str(out), "err": str(err)}) + "\n")
        self._server.stdin.flush()
        return Done(int(self._server.stdout.readline()), out.read_text(), err.read_text())

    def fresh(self, *words: object, cwd: Path | None = None, program: tuple[str, ...] = (), **env: str) -> Done:
        """Run the installed script, or another program, from the start of a new interpreter."""
        script = Path(sys.executable).parent / "anomalib"
        program = program or ((str(script),) if script.exists() else (sys.executable, "-m", "anomalib.cli.cli"))
        command = [*program, *(str(word) for word in words)]
        pipes = {"capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, cwd=cwd or self.folder, env=self.env | env, **pipes)
        return Done(done.returncode, done.stdout, done.stderr)

    def close(self) -> None:
        """End the process that was kept."""
        if self._server is not None:
            self._server.communicate()


@pytest.fixture(scope="session")
def anomalib(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Anomalib]:
    """The command line of Anomalib, in an empty folder."""
    command = Anomalib(tmp_path_factory.mktemp("anomalib"))
    yield command
    command.close()


@pytest.fixture(scope="session")
def small_model() -> list[str]:
    """Words for a model that trains in a fraction of a second, without weights."""
    model = "--model.backbone filter_bank --model.layers [scale1,scale2] --model.image_size [64,64]"
    return [*["--trainer.accelerator", "cpu", "--model", "OTPrototypes"], *model.split(), "--model.num_prototypes", "8"]


@pytest.fixture(scope="session")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good images to train on; two good ones and one of each of the six defects for validation and test."""
    root = tmp_path_factory.mktemp("fabric") / "set"
    FabricFolder(num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64)).ensure(root)
    return root


@pytest.fixture(scope="session")
def small_data(fabric: Path) -> list[str]:
    """Words for that data set."""
    data = "--data SyntheticFabric --data.num_train 6 --data.num_test_good 2 --data.num_per_defect 1"
    return [*data.split(), "--data.image_size", "[64,64]", "--data.root", str(fabric)]


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.BaseContext:
    """Start processes from one that has imported Anomalib once; a fork of one that has threads may crash."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["anomalib.engine", "anomalib_ot.integration.models.ota_detector"])
    return context


@pytest.fixture
def in_two_processes(processes: multiprocessing.context.BaseContext) -> Iterator[dict[str, object]]:
    """Arguments of a trainer that works in two processes."""
    from lightning.pytorch.strategies import DDPStrategy
    from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy

    before = get_sharing_strategy()
    set_sharing_strategy("file_system")  # a new process takes 250 files, a network has more tensors
    yield {"devices": 2, "strategy": DDPStrategy(start_method=processes.get_start_method())}
    set_sharing_strategy(before)


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch converts equal models once; what is tested here comes after that."""
    from anomalib.models.components import AnomalibModule

    convert, kept = AnomalibModule.to_onnx, {}

    def to_onnx(self, export_root, model_file_name="model", input_size=None, **kwargs):
        state = hashlib.sha256()
        for value in self.state_dict().values():
            state.update(value.contiguous().numpy().tobytes())
        # Models of the same arguments and weights give the same graph, a model and its checkpoint among them.
        asked = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        parts = (self.model, self.post_processor, type(self.pre_processor), dict(self.hparams))
        key = (state.hexdigest(), repr(parts), repr(asked | {"training": False}), input_size, repr(kwargs))
        if key not in kept:
            path = convert(self, tmp_path_factory.mktemp("converted"), model_file_name, input_size, **kwargs)
            kept[key] = path.parents[2]
        shutil.copytree(kept[key], export_root, dirs_exist_ok=True)
        return next(Path(export_root).rglob("*.onnx"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalibModule, "to_onnx", to_onnx)
        yield


# ---- the wheel

ROOT = Path(__file__).parents[2]
# Of a process that is to see no checkout.
OUTSIDE = {n: v for n, v in os.environ.items() if n not in {"PYTHONPATH", "PYTHONWARNINGS"}} | {"OMP_NUM_THREADS": "1"}


def run(*command: object, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end and show what it said if it fails."""
    options = {"env": OUTSIDE, **options}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Environment:
    """A virtual environment of its own, in which the packages of the running one can be imported."""

    def __init__(self, folder: Path) -> None:
        """Create it; ``.pth`` files of the running environment stay without effect in it."""
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        outer = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
        (self.site / "outer_environment.pth").write_text("\n".join(outer) + "\n")

    def ask(self, code: str, *flags: str, **options: object) -> str:
        """Run Python code in another folder than the checkout and return what it prints."""
        return run(self.python, *flags, "-c", code, cwd=self.folder, **options).stdout

    def pip(self, *words: object) -> None:
        """Let the running pip work on this environment, without a network."""
        run(sys.executable, "-m", "pip", "--python", self.python, *words, cwd=self.folder)

    def install(self, *what: object) -> None:
        """Install a wheel, or ``-e`` and a folder, even if the running environment has the package too."""
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)

    def files(self) -> set[Path]:
        """List every file, apart from compiled ones."""
        return {path for path in (self.folder / "venv").rglob("*") if path.is_file() and path.suffix != ".pyc"}

    def modules_at_start(self) -> set[str]:
        """Name the modules that ``python -c pass`` imports."""
        done = run(self.python, "-X", "importtime", "-c", "pass", cwd=self.folder)
        return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment with the wheel in it."""
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment
