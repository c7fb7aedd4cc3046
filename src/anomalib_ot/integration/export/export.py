"""What leaves the model: exports that refuse an untrained one, are compared with it, and say what they are."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import W_OK, access
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType
from anomalib.post_processing import PostProcessor
from lightning_utilities.core.imports import module_available
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.checks.advanced import check_place, flat, flat_defaults, nested
from anomalib_ot.integration.checks.checkpoints import checked_reading, plain, trained_arguments
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_fitted
from anomalib_ot.integration.data.batches import CAUSES
from anomalib_ot.integration.export.manifest import (
    RT_INFO,
    as_text,
    base_manifest,
    write_manifest,
    write_manifest_into_onnx,
)
from anomalib_ot.integration.export.parity import (
    check_parity,
    described,
    measured_parity,
    probe_images,
    says_little,
    torch_outputs,
)
from anomalib_ot.integration.export.runtime import (
    Predict,
    openvino_predict,
    openvino_runtime,
    predict_of_onnx,
    quiet_export,
    without_settled_choices,
)
from anomalib_ot.integration.processing.pre_post import flat_transforms, without_causes
from anomalib_ot.vision.resize import AntialiasResize

if TYPE_CHECKING:
    from torchmetrics import Metric

    from anomalib_ot.integration.export.quantization import Samples

logger = logging.getLogger(__name__)

SCORES, CALIBRATION = "anomalib_ot_scores", "anomalib_ot_calibration"
# Anomalib asks for 14, which torch cannot write: it tries, prints a page of traceback, and writes 18.
ONNX_DEFAULTS = {"opset_version": 18, "verbose": False}
PRECISIONS = {None: "FP32", CompressionType.FP16: "FP16"}
CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
CALIBRATION_IMAGES, ACCURACY_IMAGES, PROBES = 128, 400, 8


class CheckedExport:
    """Exports of an `AnomalibModule` that are compared with it and say what they are; an untrained one has none.

    It stands before `AnomalibModule` among the bases of a model, which says by `is_fitted` whether it was trained, and
    by `export_kind` whether it finds an "anomaly" or "boxes". Convolutions and products of the modules `integer_rooms`
    may become integers. `trained_by` are the arguments that a checkpoint decides about, `options` is the
    dataclass of its argument `advanced`. Beside each export lies a `manifest.json`.
    """

    export_kind: ClassVar[str]
    integer_rooms: ClassVar[Sequence[str]]
    trained_by: ClassVar[Sequence[str]]
    options: ClassVar[type]
    known_scores: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None  # of the image threshold, in units of raw scores

    def __new__(cls, *args: Any, **kwargs: Any) -> "CheckedExport":
        """Say where an argument is that stood beside the others before version 0.2."""
        del args
        check_place(cls, cls.options, kwargs)
        return super().__new__(cls)

    @property
    def has_own_scores(self) -> bool:
        """Whether exported image scores are those of validations, at most put to scale by Anomalib's post-processor."""
        return self.post_processor is None or isinstance(self.post_processor, PostProcessor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the distribution of scores, and where the threshold comes from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SCORES], checkpoint[CALIBRATION] = self.known_scores, self.calibration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore both; older checkpoints have neither. Also tell where the backbone's weights were from."""
        super().on_load_checkpoint(checkpoint)
        trained = checkpoint.get("hyper_parameters", {})
        if trained.get("backbone_weights") != "random":  # version 0.1 called pre_trained=False so
            self.hparams.update({key: trained[key] for key in ("pre_trained", "backbone_weights") if key in trained})
        self.known_scores, self.calibration = checkpoint.get(SCORES), checkpoint.get(CALIBRATION)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "CheckedExport":
        """Load a trained model, for an export with the arguments that it was given; an `InputError` if that fails."""
        given = given_to_export(cls)
        own = {name: value for name, value in given.items() if name not in cls.trained_by}
        if False in (own.get("pre_processor"), own.get("post_processor")):
            own["strict"] = False  # what the checkpoint keeps of the part that is left out has no place
        check_place(cls, cls.options, kwargs)
        from anomalib_ot.integration.checks.checked_checkpoint_io import AnomalibCheckpointIO

        with checked_reading(checkpoint_path):
            reader = AnomalibCheckpointIO(cls.checkpoint_safe_globals())
            content = reader.load_checkpoint(checkpoint_path, "cpu", kwargs.get("weights_only") is not False)
            own = nested(cls.saved_arguments(content)["advanced"] | own | flat(kwargs), cls.options)
            model = super().load_from_checkpoint(checkpoint_path, *args, **own)
        # Tells of those that the checkpoint has overruled.
        trained_arguments(
            {"hyper_parameters": model.hparams}, given, [name for name in cls.trained_by if name in given]
        )
        return model

    @classmethod
    def saved_arguments(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a checkpoint as the model takes them today."""
        return nested(checkpoint.get("hyper_parameters", {}), cls.options)

    # ---- exports

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to PyTorch; see Anomalib's `ExportMixin.to_torch`; an `InputError` if that is not possible."""
        check_fitted(self, "export")
        check_uncompressed("torch")
        check_export_root(export_root)
        path = super().to_torch(export_root, model_file_name)
        self.eval()
        names = torch_outputs(self, torch.zeros(1, 3, *self.hparams["image_size"]))
        write_manifest(base_manifest(self, list(names), None, "FP32"), path)
        return path

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *,
        check_parity: bool = True,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX; see Anomalib's `ExportMixin.to_onnx`, and `torch.onnx.export` for more arguments.

        `input_size` is the height and width that the graph takes, pixels, None: any. `check_parity` compares with
        PyTorch.

        Raises:
            InputError: If the folder cannot be written, or a compression was asked for.
            ParityError: If the export does not agree with PyTorch.
        """
        check_fitted(self, "export")
        check_uncompressed("onnx")
        check_export_root(export_root)
        import onnx

        with quiet_export():
            path = Path(super().to_onnx(export_root, model_file_name, input_size, **ONNX_DEFAULTS | kwargs))
        names = [output.name for output in onnx.load(str(path), load_external_data=False).graph.output]
        manifest = base_manifest(self, names, input_size, "FP32")
        runs = predict_of_onnx(path) if check_parity else None
        if runs is not None:
            try:
                manifest["parity"] = self._agreement(*runs, input_size, "FP32")
            except RuntimeError:
                for file in (path, path.with_name(f"{path.name}.data")):
                    file.unlink(missing_ok=True)
                raise
        elif check_parity:
            logger.warning("The export was not compared with PyTorch: neither onnxruntime nor openvino is installed")
        write_manifest_into_onnx(manifest, path)
        write_manifest(manifest, path)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: "Metric | None" = None,
        task: object = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
        *,
        check_parity: bool = True,
    ) -> Path:
        """Export to OpenVINO; see Anomalib's `ExportMixin.to_openvino`.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the file.
            input_size: Height and width that the graph takes, pixels; None: any.
            compression_type: FP16 or INT8 (weights alone), INT8_PTQ or INT8_ACQ (all that stands it); None: float32.
            datamodule: Images to calibrate integers with, to measure accuracy on, and to compare with PyTorch on.
            metric: What INT8_ACQ measures; None: image AUROC, or mAP of a detector.
            task: Not used; it stands in Anomalib's signature.
            max_drop: Loss of the metric that INT8_ACQ allows, 0 to 1.
            ov_kwargs: See `openvino.convert_model`.
            onnx_kwargs: See `torch.onnx.export`; `check_parity` among them counts as the argument.
            check_parity: Whether the export is compared with PyTorch.

        Raises:
            InputError: If a package is missing, data for integers, or the folder cannot be written.
            ParityError: If the export does not agree with PyTorch.
        """
        check_fitted(self, "export")
        kind = None if compression_type is None else CompressionType(compression_type)
        check_export_root(export_root)
        check_packages(kind, datamodule)
        import openvino

        from anomalib_ot.integration.export.quantization import (
            Samples,
            check_accuracy_control,
            compressed,
            float_operations,
            measured_cost,
        )

        onnx_kwargs = dict(onnx_kwargs or {})
        check_parity = onnx_kwargs.pop("check_parity", check_parity)
        precision = PRECISIONS.get(kind, "INT8")
        options = {"compress_to_fp16": precision == "FP16"}
        calibration = Samples(datamodule, "train", CALIBRATION_IMAGES, input_size) if kind in CALIBRATED else None
        validation = None if datamodule is None else Samples(datamodule, "val", ACCURACY_IMAGES, input_size)
        if kind == CompressionType.INT8_ACQ:
            check_accuracy_control(validation, metric)
        path = Path(export_root) / "weights" / "openvino" / f"{model_file_name}.xml"
        with TemporaryDirectory() as folder:
            with quiet_export():
                onnx_path = Path(super().to_onnx(folder, model_file_name, input_size, **ONNX_DEFAULTS | onnx_kwargs))
            graph = precise = without_settled_choices(openvino.convert_model(onnx_path, **(ov_kwargs or {})))
            manifest = base_manifest(self, [output.any_name for output in graph.outputs], input_size, precision)
            if precision == "INT8":
                kept = float_operations(graph, onnx_path, self.integer_rooms)
                graph = compressed(graph, kind, kept, calibration, validation, metric=metric, max_drop=max_drop)
            trial = Path(folder) / "trial.xml"
            openvino.save_model(graph, trial, **options)
            predict = openvino_predict(trial)
            if check_parity:
                manifest["parity"] = self._agreement(predict, openvino_runtime(), input_size, precision, validation)
            if validation is not None and kind is not None:
                manifest |= measured_cost(openvino_predict(precise), predict, validation, manifest)
            graph.set_rt_info(as_text(manifest), [RT_INFO])
            path.parent.mkdir(parents=True, exist_ok=True)
            openvino.save_model(graph, path, **options)
        write_manifest(manifest, path)
        return path

    def _agreement(
        self,
        predict: Predict,
        runtime: str,
        input_size: Sequence[int] | None,
        precision: str,
        samples: "Samples | None" = None,
    ) -> dict[str, Any]:
        """Compare an export with PyTorch, on images of a data set if there are any, and tell the result."""
        self.eval()
        rows = [] if samples is None else range(0, len(samples), max(1, len(samples) // PROBES))
        images = probe_images(self, input_size, [samples.image(row) for row in rows][:PROBES])
        parity = measured_parity(self, predict, images, precision, runtime)
        logger.info("The export compared with PyTorch, %s", described(parity))
        check_parity(parity)
        if says_little(parity):
            hint = "" if samples is not None else "; name a data set (--data ...) to compare on its images"
            logger.warning("The model finds next to nothing in the images compared%s", hint)
        return parity


class ExplainedExport(CheckedExport):
    """Exports with or without the causes of the anomaly map, as the model's `export_explanation` says."""

    export_kind = "anomaly"
    integer_rooms = ("model.feature_extractor",)
    export_explanation: bool

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *,
        export_explanation: bool | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX; `export_explanation` counts for this export alone, None leaves the model's."""
        check_input_size(self, input_size)
        with self._explaining(export_explanation):
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *args: Any,
        onnx_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO; `export_explanation` among `onnx_kwargs` counts for this export alone."""
        check_input_size(self, input_size)
        onnx_kwargs = dict(onnx_kwargs or {})
        with self._explaining(onnx_kwargs.pop("export_explanation", None)):
            return super().to_openvino(
                export_root, model_file_name, input_size, *args, onnx_kwargs=onnx_kwargs, **kwargs
            )

    @contextmanager
    def _explaining(self, export_explanation: bool | None) -> Iterator[None]:
        former = self.export_explanation
        self.export_explanation = former if export_explanation is None else bool(export_explanation)
        try:
            yield
        finally:
            self.export_explanation = former

    def forward(self, batch: Tensor, *args: object, **kwargs: object) -> Explained | tuple:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        predictions = super().forward(batch, *args, **kwargs)
        if self.model.roi.numel():  # normalization lifts what was 0
            names = [name for name in ("anomaly_map", *CAUSES) if getattr(predictions, name, None) is not None]
            maps = {name: getattr(predictions, name) for name in names}
            inside = {name: torch.where(self.model.roi, values, 0.0) for name, values in maps.items()}
            predictions = predictions._replace(**inside)
        return predictions if self.export_explanation else without_causes(predictions)


# ---- what has to be right before an export begins: packages, data, the folder, and arguments that would do nothing


def check_export_root(export_root: Path | str) -> None:
    """Make the folder to export to, before minutes of work; an `InputError` if it cannot be made, or written to."""
    path, cure = Path(export_root), "give a folder that can be written"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--export_root is '{path}', which cannot be made a folder ({error.strerror}); {cure}"
        raise InputError(msg) from error
    if not access(path, W_OK):
        raise InputError(f"--export_root is '{path}', which may not be written to; {cure}")


def check_input_size(model: Any, input_size: Sequence[int] | None) -> None:
    """Refuse, with an `InputError`, a graph for images of any size (None) if nothing in it brings them to one."""
    transform = getattr(model.pre_processor, "export_transform", None)
    parts = [] if transform is None else [*transform.modules(), *flat_transforms(transform)]
    if input_size is None and not any(isinstance(part, AntialiasResize | Resize) for part in parts):
        size = ",".join(str(int(side)) for side in model.hparams["image_size"])
        raise InputError(
            "--input_size is not given, and no pre-processor resizes (pre_processor is False or of your own); expected "
            f"the height and width that images will have, as in training: --input_size [{size}]"
        )


def export_call() -> dict[str, Any]:
    """Return the variables of the call of Anomalib's `Engine.export` that this one is made in; none outside of one.

    It does not hand over all that it was given, so that it is taken from the frame of that call.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "export" and type(frame.f_locals.get("self")).__name__ == "Engine":
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def given_to_export(kind: type) -> dict[str, Any]:
    """Find the arguments of the model that Anomalib's `Engine.export` was given together with a checkpoint.

    It loads the checkpoint as another model, with the arguments of the training. What differs from the defaults of the
    class `kind` counts as given, that in `advanced` beside the others; nothing does outside of such a call.
    """
    model = export_call().get("model")
    if type(model) is not kind:
        return {}
    defaults = flat_defaults(kind)
    known = {name: value for name, value in flat(model.hparams).items() if name in defaults}
    given = {name: value for name, value in known.items() if plain(value) != plain(defaults[name])}
    for name in ("pre_processor", "post_processor"):
        part, usual = getattr(model, name), getattr(model, f"configure_{name}")()
        if type(part) is not type(usual) or not getattr(model, f"takes_{name}", True):
            given[name] = False if part is None else part
    return given


def check_uncompressed(form: str) -> None:
    """Refuse a `compression_type` that `Engine.export` was given and drops: only OpenVINO exports have one."""
    kind = export_call().get("compression_type")
    if kind is not None:
        raise InputError(
            f"--compression_type is {CompressionType(kind).value}, which --export_type {form} cannot have; "
            "leave it out, or take --export_type openvino"
        )


def check_packages(kind: CompressionType | None, datamodule: AnomalibDataModule | None) -> None:
    """Check that there are the packages, and images to calibrate with, that an export to OpenVINO needs."""
    needed = ["openvino"] if kind in PRECISIONS else ["openvino", "nncf"]
    missing = [name for name in needed if not module_available(name)]
    if missing:
        raise InputError(f"this export needs the package {missing[0]}: pip install 'anomalib-ot[openvino]'")
    if kind in CALIBRATED and datamodule is None:
        msg = f"--compression_type {kind.value} needs images to calibrate with; name the data set (--data ...)"
        raise InputError(msg)
