"""Let Anomalib find the models and datamodules of installed packages by their short names.

Anomalib resolves a name such as ``--model Padim`` among the classes that are imported already, and reads no entry
points. ``install`` puts a finder on ``sys.meta_path`` that stays idle until ``anomalib.models`` or ``anomalib.data`` is
imported. Right after that import it loads the entry points of the group with the same name, so that their classes exist
where Anomalib looks for them. Any distribution may join the two groups; this one has no privilege in them.

Python runs this module whenever it starts, by ``anomalib_ot.pth`` (up to 3.14) or ``anomalib_ot.start`` (PEP 829, from
3.15). Therefore it imports nothing but ``sys`` until there is work, and uses the standard library only. It stands
beside the package, not in it: importing ``anomalib_ot.startup`` would bring the package into every Python process.

Two rules follow for plugins, since the hook runs in the middle of somebody's import. An entry point names a *leaf*
module, never a package that re-exports the class: a package may be half imported then. And a leaf does not import what
imports the module of its group on the way (``anomalib.engine`` and ``anomalib.callbacks`` import ``anomalib.models``).
"""

import sys

GROUPS = ("anomalib.models", "anomalib.data")
_told = set()  # problems that were warned of: a distribution that cannot be read concerns both groups


class _Finder:
    """Meta path finder that finds nothing itself, and lends the modules in ``GROUPS`` a ``_Loader``."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in GROUPS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Run a module with its own loader, then register the plugins; everything else is the own loader's."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register(module)


def register(module):
    """Load the entry points of the group named like ``module``, and make their classes its attributes.

    Loading alone serves ``--model``, ``--data``, ``get_model("name")`` and ``list_models()``: they ask a base class for
    its subclasses. The attributes serve ``get_model({"class_path": ...})``, ``get_datamodule`` and ``anomalib
    benchmark``. A dotted ``class_path`` is accepted by ``get_model`` only from the packages in ``ALLOWED_MODULES``; the
    top-level package of each installed entry point joins them, and nothing else does.

    Args:
        module: The module ``anomalib.models`` or ``anomalib.data``, executed to its end.

    Warns:
        RuntimeWarning: Once, if entry points cannot be read or loaded, or a plugin wants to exit. Anomalib and the
            other plugins go on without them, and asking for the attribute raises the cause. Where warnings are errors
            it is a line on standard error: a plugin must not break the import of Anomalib.
    """
    problems = []
    entries = _entries(module.__name__, problems)
    for entry in entries.values():
        if _is_importing(_module_name(entry)):
            continue  # that import led here; its class exists when it ends
        try:
            entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too
            problems.append(f"plugin {entry.name!r} ({entry.value}) could not be loaded: {error!r}")
    problems = [problem for problem in problems if problem not in _told]
    _told.update(problems)
    if problems:
        _warn(f"Anomalib {'; '.join(problems)}. {module.__name__} goes on; update or uninstall what brings them.")

    fallback = getattr(module, "__getattr__", None)

    def module_getattr(name):
        if name in entries:
            try:
                return entries[name].load()
            except SystemExit as error:
                msg = f"plugin {name!r} ({entries[name].value}) wants to exit: {error!r}"
                raise ImportError(msg) from error
        if fallback is not None:
            return fallback(name)
        msg = f"module {module.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    module.__getattr__ = module_getattr

    allowed_modules = getattr(module, "ALLOWED_MODULES", None)
    if isinstance(allowed_modules, set):
        allowed_modules.update(_module_name(entry).partition(".")[0] for entry in entries.values())


def _entries(group, problems):
    """Return the entry points of a group by name; distributions whose own cannot be read are told to ``problems``."""
    from importlib.metadata import distributions, entry_points

    try:
        return {entry.name: entry for entry in entry_points(group=group)}
    except Exception:  # one unreadable file spoils that; the others are read one by one, which is slower
        found, seen = {}, set()
    for distribution in distributions():
        name = "?"
        try:
            name = distribution.metadata["Name"]
            if name not in seen:  # the first on the path is the one that is imported
                found.update((entry.name, entry) for entry in distribution.entry_points if entry.group == group)
        except Exception as error:
            problems.append(f"plugins of the distribution {name} could not be read ({error!r})")
        seen.add(name)
    return found


def _module_name(entry):
    """Name the module of an entry point, whatever its value looks like."""
    return entry.value.partition(":")[0].strip()


def _warn(msg):
    """Warn, or say it on standard error where warnings are errors."""
    import warnings

    try:
        warnings.warn(msg, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        if sys.stderr is not None:
            print(f"RuntimeWarning: {msg}", file=sys.stderr)


def _is_importing(name):
    """Tell whether the import of the module ``name`` has begun and not ended."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def install():
    """Watch for Anomalib's import, and catch up with what is imported already; further calls do nothing.

    In a virtual environment Python may process a ``.pth`` file twice, so the second call must be harmless.
    """
    if any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in GROUPS:
        if name in sys.modules and not _is_importing(name):
            register(sys.modules[name])
