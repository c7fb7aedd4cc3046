"""FAISS, which accelerates the search for nearest prototypes: imported when needed, from whichever package has it."""

import logging
from functools import cache
from types import ModuleType

__all__ = ["import_faiss"]

logger = logging.getLogger(__name__)

ONE_OF = "pip install faiss-cpu, or on Linux with an NVIDIA card faiss-gpu; never both"


def import_faiss() -> ModuleType | None:
    """Import FAISS when it is needed, as importing Anomalib's models loads this file; without its loader's chatter.

    None if it is not installed, which is logged once; an `ImportError` that says what to do if it cannot be loaded.
    """
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        _say_missing()
        return None
    except (ImportError, OSError) as error:  # a library that it needs is missing
        msg = f"FAISS is installed and cannot be loaded ({error}); pip uninstall faiss-cpu faiss-gpu, then {ONE_OF}"
        raise ImportError(msg) from error
    if not hasattr(faiss, "IndexFlatL2"):  # the folder that is left when one of two packages was uninstalled
        msg = f"FAISS is installed in parts only, as after removing one of two packages; {ONE_OF}, --force-reinstall"
        raise ImportError(msg)
    return faiss


@cache
def _say_missing() -> None:
    logger.warning("FAISS is not installed: PyTorch searches for nearest prototypes, which takes longer; %s", ONE_OF)
