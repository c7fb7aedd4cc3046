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
        RuntimeWarning: If an entry point cannot be loaded. Anomalib and the other plugins go on without it, and asking
            for the attribute raises the cause.
    """
    from importlib.metadata import entry_points

    entries = {entry.name: entry for entry in entry_points(group=module.__name__)}
    for entry in entries.values():
        if _is_importing(entry.module):
            continue  # that import led here; its class exists when it ends
        try:
            entry.load()
        except Exception as error:
            import warnings

            msg = (
                f"Anomalib plugin {entry.name!r} ({entry.value}) could not be loaded, so {module.__name__} goes on "
                f"without it: {error!r}. Update or uninstall the distribution that brings it."
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=2)

    fallback = getattr(module, "__getattr__", None)

    def module_getattr(name):
        if name in entries:
            return entries[name].load()
        if fallback is not None:
            return fallback(name)
        msg = f"module {module.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    module.__getattr__ = module_getattr

    allowed_modules = getattr(module, "ALLOWED_MODULES", None)
    if isinstance(allowed_modules, set):
        allowed_modules.update(entry.module.partition(".")[0] for entry in entries.values())


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
