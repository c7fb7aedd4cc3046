"""The model: one backbone pass, several members, one map that splits into its causes."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_ot.anomaly.fitting import fit_bank
from anomalib_ot.anomaly.growth import add_prototype, allow_amounts, costliest_patch
from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.outliers import forget_outliers
from anomalib_ot.anomaly.prototypes import PatchScores, PrototypeBank, take_saved_shapes
from anomalib_ot.anomaly.region import patches_inside
from anomalib_ot.anomaly.scoring import LEAST_PLACED, TransportScore, find_kinds, image_score, places_of_kinds
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.ot.threads import is_traced
from anomalib_ot.vision.patches import MapSmoother, patch_embeddings
from anomalib_ot.vision.tiling import Tiling

Source = tuple[tuple[str, ...], int]
Embedded = dict[Source, tuple[Tensor, tuple[int, int]]]
FIT_IMAGES = 8
CPU_PORTION = 4  # images
CPU_TILE_PIXELS, TILE_PIXELS = 2**18, 2**22  # of the tiles that go through the network at a time
EXPORTED_PORTIONS = 8  # at most, each with nodes of its own in the graph


class Growth(NamedTuple):
    """What a good image has taken to be good: its `score` before, `prototypes` added per member, room for `amounts`."""

    score: float
    prototypes: list[int]
    amounts: bool


class Explained(NamedTuple):
    """What the model says of B images.

    `anomaly_map` (B, 1, H, W) is exactly `feature_map + position_map + missing_map`: how much a place looks wrong, how
    much what is seen there belongs elsewhere, and how much of what good images have there is missing;
    `matched_position` (B, 2, h, w) is where a patch belongs, (y, x) in [0, 1]. `pred_score` (B,) is the score of the
    image, `transport_score` (B,) its image-level part. A model without one has no `missing_map` either;
    one that sees tiles has no `matched_position`.
    """

    pred_score: Tensor
    pred_label: Tensor | None
    anomaly_map: Tensor
    pred_mask: Tensor | None
    feature_map: Tensor
    position_map: Tensor
    matched_position: Tensor | None
    transport_score: Tensor | None
    missing_map: Tensor | None = None


def training_portions(
    images: Tensor, keys: Sequence[str] | None, tiling: Tiling | None
) -> Iterator[tuple[Tensor, Sequence[str] | None]]:
    """Yield what the network sees of a training batch, with a name for each: images, or the tiles of each image."""
    size = _portion(images, tiling)
    for number, part in enumerate([images] if tiling is None else images.split(1)):
        seen, names = part, keys
        if tiling is not None:
            seen = tiling.cut(part)
            names = None if keys is None else [f"{keys[number]} tile {i:05}" for i in range(len(seen))]
        for start in range(0, len(seen), size):
            yield seen[start : start + size], None if names is None else names[start : start + size]


def _portion(images: Tensor, tiling: Tiling | None) -> int:
    """Number of images, or tiles, that go through the network at a time, which bounds memory whatever there is."""
    on_cpu = images.device.type == "cpu"
    if tiling is None:
        return CPU_PORTION if on_cpu else len(images)
    return max((CPU_TILE_PIXELS if on_cpu else TILE_PIXELS) // (tiling.size[0] * tiling.size[1]), 1)


class PrototypesModel(nn.Module):
    """Anomaly detection by transport of patches to prototypes of normal parts.

    Args:
        feature_extractor: Maps images (B, 3, H, W) to a dict of feature maps by layer name; frozen.
        members: The members of the ensemble, whose maps are averaged by their weights.
        score: Image score, "mean_top1" or "max" of the map.
        smoothing: Standard deviation of the Gaussian over the map, pixels.
        transport_score: Whether the image-level transport score takes part in the image score.
        num_groups: Kinds of patches per member that the transport score counts.
        tiling: How images are cut, for large surfaces; None: not at all. Then the network sees tiles, in training too,
            all tiles share the prototypes, and their maps are put together to that of the image.

    Raises:
        ValueError: If there are tiles, and members with a position cost or a transport score: the place within a tile
            means nothing, and amounts are those of images.

    References:
        R. Trombetta, C. Lartizien, "Learning local and global prototypes with optimal transport for unsupervised
        anomaly detection and localization", 2025.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        members: Sequence[Member],
        *,
        score: str = "mean_top1",
        smoothing: float = 4.0,
        transport_score: bool = False,
        num_groups: int = 16,
        tiling: Tiling | None = None,
    ) -> None:
        super().__init__()
        if tiling is not None and (transport_score or any(member.alpha for member in members)):
            msg = "tiling needs members with alpha=0 and no transport score: a place within a tile means nothing"
            raise ValueError(msg)
        self.tiling = tiling
        self.feature_extractor = feature_extractor
        self.banks = nn.ModuleList(PrototypeBank(member) for member in members)
        self.smoother = MapSmoother(smoothing)
        self.score = score
        self.transport_score = TransportScore(num_groups) if transport_score else None
        self.register_buffer("is_fitted", torch.tensor(False))
        self.register_buffer("roi", torch.zeros(0, dtype=torch.bool))
        self.roi_share = 1.0
        self.outliers: list[int] = []  # numbers of the training images that the fit found unlike all others

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the region of interest of a checkpoint; those from before there were regions have none."""
        state_dict.setdefault(prefix + "roi", torch.zeros(0, dtype=torch.bool))
        take_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.set_region(self.roi)

    def set_region(self, roi: Tensor) -> None:
        """Let only some pixels (H, W) count, at least one, in the fit and in scores; empty: all.

        To be called before the fit. The others are replaced by the mean color before the backbone sees them, their
        patches are left out, and the map is 0 there: nothing depends on what they show.
        """
        self.roi = roi
        for bank in self.banks:  # known once a grid is
            bank.inside = bank.nearest_inside = torch.zeros(0, dtype=torch.long, device=roi.device)
        self.roi_share = float(roi.float().mean()) if roi.numel() else 1.0

    @property
    def sources(self) -> list[Source]:
        """The distinct (layers, pooling) that members take their embeddings from, in order."""
        return list(dict.fromkeys(bank.source for bank in self.banks))

    def embed(self, images: Tensor) -> Embedded:
        """Return embeddings (B, N, D) and grid size per source, in float32 whatever autocast says.

        With a region of interest the N patches are those that it touches.

        Raises:
            ValueError: If there is one, and the images are not of its size.
        """
        features = self.feature_extractor(self._seen(images))
        with torch.autocast(images.device.type, enabled=False):
            embedded = {
                (layers, pooling): patch_embeddings([features[layer] for layer in layers], pooling)
                for layers, pooling in self.sources
            }
            if not self.roi.numel():
                return embedded
            return {
                source: (embeddings[:, self._inside(source, grid)], grid)
                for source, (embeddings, grid) in embedded.items()
            }

    def _seen(self, images: Tensor) -> Tensor:
        """Put the mean color outside the region of interest."""
        if not self.roi.numel():
            return images
        if images.shape[-2:] != self.roi.shape:
            (height, width), (roi_height, roi_width) = images.shape[-2:], self.roi.shape
            msg = (
                f"images reach the network with {height} x {width} pixels, and the region of interest (roi) has "
                f"{roi_height} x {roi_width}; expected one size: keep the default pre_processor, which resizes to it"
            )
            raise ValueError(msg)
        return torch.where(self.roi, images, 0.0)

    def _inside(self, source: Source, grid: tuple[int, int]) -> Tensor:
        """Return the numbers of the patches that count, the same for all members with this source."""
        banks = [bank for bank in self.banks if bank.source == source]
        if not len(banks[0].inside):
            inside, nearest = patches_inside(self.roi, grid)
            for bank in banks:
                bank.inside, bank.nearest_inside = inside, nearest
        return banks[0].inside

    def forward(self, images: Tensor) -> Explained:
        """Score normalized images (B, 3, H, W)."""
        if self.tiling is not None:
            return self._tiled(images, self.tiling)
        embedded = self.embed(images)
        with torch.autocast(images.device.type, enabled=False):
            size = (images.shape[-2], images.shape[-1])
            local = self._local(embedded, size)
            if self.transport_score is None:
                return local
            found = self._kinds(embedded)
            transport, lacking = self.transport_score(self.transport_score.roots(found))
            excess = self.transport_score.excess(transport)
            missing = excess[:, None, None, None] * self._missing(found, lacking, embedded, size)
            if self.roi.numel():
                missing = torch.where(self.roi, missing, 0.0)
            return local._replace(
                pred_score=local.pred_score + excess,
                anomaly_map=local.anomaly_map + missing,
                missing_map=missing,
                transport_score=transport,
            )

    def predict(self, images: Tensor) -> Explained:
        """Score normalized images (B, 3, H, W) as `forward` does, in portions."""
        parts = [self(some) for some in images.split(_portion(images, None))]
        return Explained(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))

    def _tiled(self, images: Tensor, tiling: Tiling) -> Explained:
        """Score normalized images (B, 3, H, W) tile by tile, no smaller than a tile."""
        size = (images.shape[-2], images.shape[-1])
        if size[0] < tiling.size[0] or size[1] < tiling.size[1]:
            msg = (
                f"images reach the network with {size[0]} x {size[1]} pixels, less than a tile (tile_size "
                f"{list(tiling.size)}); expected images of at least that size: keep the default pre_processor"
            )
            raise ValueError(msg)
        exported = is_traced()
        parts = [images] if exported else images.split(1)  # alone, an image scores as it does in a batch
        maps = []
        for part in parts:
            tiles = tiling.cut(part).unflatten(0, (-1, len(tiling.corners(*size))))
            count = _portion(images, tiling)
            if exported:
                count = max(count, -(-tiles.shape[1] // EXPORTED_PORTIONS))
            found = [self._tile_maps(some) for some in tiles.split(count, dim=1)]
            maps.append(tiling.stitch(torch.cat(found, dim=1), size))
        feature_map = torch.cat(maps)
        position_map = torch.zeros_like(feature_map)
        anomaly_map = feature_map + position_map
        score = image_score(anomaly_map, self.score)
        return Explained(score, None, anomaly_map, None, feature_map, position_map, None, None, None)

    def _tile_maps(self, tiles: Tensor) -> Tensor:
        """Return the maps (B, T, 1, h, w) of tiles (B, T, 3, h, w)."""
        embedded = self.embed(tiles.flatten(0, 1))
        with torch.autocast(tiles.device.type, enabled=False):
            found = self._local(embedded, (tiles.shape[-2], tiles.shape[-1])).feature_map
        return found.unflatten(0, (-1, tiles.shape[1]))

    def _local(self, embedded: Embedded, size: tuple[int, int]) -> Explained:
        grids = [grid for _, grid in embedded.values()]
        finest = max(grids, key=lambda grid: grid[0] * grid[1])
        weight = torch.stack([bank.weight for bank in self.banks]).sum()
        parts: dict[tuple[tuple[int, int], bool], Tensor] = {}  # what is brought to pixels alike is summed before
        matched = []
        for bank in self.banks:
            embeddings, grid = embedded[bank.source]
            scores = bank(embeddings, grid)
            maps = torch.stack([scores.feature, scores.position], dim=1).unflatten(2, grid) * bank.weight / weight
            alike = grid, bank.member.align_corners
            parts[alike] = parts[alike] + maps if alike in parts else maps
            matched.append(_on_grid(scores, grid, finest))
        maps = self.smoother(list(parts.values()), size, [corners for _, corners in parts])
        if self.roi.numel():
            maps = torch.where(self.roi, maps, 0.0)
        feature_map, position_map = maps[:, :1], maps[:, 1:]
        anomaly_map = feature_map + position_map
        score = image_score(anomaly_map, self.score, self.roi_share)
        position = _most_misplaced(matched)
        return Explained(score, None, anomaly_map, None, feature_map, position_map, position, None, None)

    def fit(
        self,
        patches: dict[Source, Patches],
        size: tuple[int, int],
        seed: int,
        *,
        resume: bool = False,
        report: Callable[[str, int, int], None] | None = None,
    ) -> list[float]:
        """Fit every member, and the transport score, to normal patches per source, on the device of the buffers.

        The patches are of images of this size (H, W), pixels. `resume` refines what is there instead of starting anew,
        `seed` makes two fits equal, and `report` is called with (what is done, steps done, steps in all). Returns the
        mean transport cost of each member's last pass.
        """
        costs, known = [], [patches[bank.source] for bank in self.banks]
        for number, (bank, own) in enumerate(zip(self.banks, known, strict=True)):
            name = f"member {number + 1} of {len(self.banks)}"
            progress = None if report is None else (lambda done, of, name=name: report(name, done, of))
            costs.append(fit_bank(bank, own, seed + number, resume=resume, report=progress))
        self.outliers = forget_outliers(list(self.banks), known, seed)
        if self.transport_score is not None:
            with full_precision(self.is_fitted):
                self._fit_transport(patches, size, seed)
        self.is_fitted = torch.tensor(True, device=self.is_fitted.device)
        return costs

    def fitted_state(self) -> dict[str, Tensor]:
        """Return what the fit has learned, on the CPU: all buffers but the backbone's."""
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("feature_extractor.")}
        return {name: value.cpu() for name, value in state.items()}

    def load_fitted_state(self, state: dict[str, Tensor]) -> None:
        """Take over what a fit in another process has learned."""
        self.load_state_dict({**state, **self.feature_extractor.state_dict(prefix="feature_extractor.")})

    @torch.no_grad()
    def grow(self, image: Tensor, limit: float) -> Growth:
        """Add prototypes until a good image, normalized (1, 3, H, W), scores at most `limit`, which is above 0.

        Nothing changes where it does already. Greedy as `farthest_points`: as long as the map's score is above the
        limit, the patch that has the largest part in the map's highest pixel becomes a prototype of each member. If the
        image's amounts are unusual besides, the transport score allows them. What is there stays as it is, and no image
        scores higher than before. A `ValueError` if even a prototype for each patch leaves the score above the limit.
        """
        before, added = float(self(image).pred_score), [set() for _ in self.banks]
        if before <= limit:
            return Growth(before, [0] * len(added), amounts=False)
        embedded, size = self.embed(image), (image.shape[-2], image.shape[-1])
        while float((found := self._local(embedded, size)).pred_score) > limit:
            known = sum(map(len, added))
            pixel = divmod(int(found.anomaly_map.argmax()), size[1])
            for bank, taken in zip(self.banks, added, strict=True):
                embeddings, grid = embedded[bank.source]
                scores = bank(embeddings, grid)
                rows = bank.on_grid(torch.arange(embeddings.shape[1], device=embeddings.device)[None])[0]
                cost = (scores.feature + scores.position)[0]
                cost = cost.masked_fill(torch.isin(rows, torch.tensor(sorted(taken), device=rows.device).long()), 0.0)
                patch = costliest_patch(cost.unflatten(0, grid), self.smoother, pixel, size, bank.member.align_corners)
                if cost[patch] > 0:
                    row = int(rows[patch])
                    add_prototype(bank, embeddings[0, row], bank.patch_positions(grid)[row])
                    taken.add(row)
            if sum(map(len, added)) == known:
                msg = f"the score stays above {limit:g} with a prototype for each patch; expected a higher threshold"
                raise ValueError(msg)
        score = self.transport_score
        amounts = score is not None and allow_amounts(score, score.roots(self._kinds(embedded))[0])
        return Growth(before, [len(taken) for taken in added], amounts)

    def _fit_transport(self, patches: dict[Source, Patches], size: tuple[int, int], seed: int) -> None:
        """Learn the amounts and the local scores of the training images; of each image only a few numbers are kept."""
        for bank in self._counting_banks():
            known = EncodedPatches(bank, patches[bank.source])
            find_kinds(bank, known, self.transport_score.num_groups, seed)
        roots, local, found = [], [], []
        num_images, device = len(next(iter(patches.values())).embeddings), self.is_fitted.device
        for images in torch.arange(num_images).split(FIT_IMAGES):
            embedded = {
                source: (known.embeddings[images].to(device, torch.float32), known.grid_size)
                for source, known in patches.items()
            }
            local.append(self._local(embedded, size).pred_score.cpu())
            kinds = self._kinds(embedded)
            roots.append(self.transport_score.roots(kinds).cpu())
            sums = [of_bank.sum(0) for of_bank in kinds]
            found = [before + now for before, now in zip(found, sums, strict=True)] if found else sums
        for bank, occupied in zip(self._counting_banks(), found, strict=True):
            grid = patches[bank.source].grid_size
            bank.occupancy = places_of_kinds(occupied / num_images, num_images)
            bank.occupancy = bank.on_grid(bank.occupancy[None])[0].T.unflatten(1, grid).contiguous()
        self.transport_score.learn(torch.cat(roots), torch.cat(local))

    def _counting_banks(self) -> list[PrototypeBank]:
        """The first member of each space of features: others with the same one would count the same."""
        spaces: dict[tuple, PrototypeBank] = {}
        for bank in self.banks:
            spaces.setdefault((bank.source, bank.member.feature_cost), bank)
        return list(spaces.values())

    def _kinds(self, embedded: Embedded) -> list[Tensor]:
        return [bank.kinds_of(embedded[bank.source][0]) for bank in self._counting_banks()]

    def _missing(self, found: list[Tensor], lacking: Tensor, embedded: Embedded, size: tuple[int, int]) -> Tensor:
        """Return where kinds are missing (B, 1, H, W), 0 to 1.

        ``W^2 / (W^2 + (1 - W)^2) sum_k w_k max(o_k - a_k, 0) / max_x sum_k w_k o_k`` with ``W = sum_k w_k``: little
        where there is more too much than too little, as where one too many lies on the background.

        `a_k` is how much a patch is of kind k, `o_k` the same on the mean of the training images (0 where it is a
        matter of chance), `w_k` the share of kind k in what is unusual.
        """
        maps, banks = [], self._counting_banks()
        shares = lacking.split([kinds.shape[-1] for kinds in found], dim=1)
        for bank, kinds, share in zip(banks, found, shares, strict=True):
            grid = embedded[bank.source][1]
            expected = bank.occupancy
            if expected.shape[1:] != grid:
                expected = F.interpolate(expected[None], grid, mode="bilinear", align_corners=False)[0]
            kinds = bank.on_grid(kinds)
            expected = expected.flatten(1).T.expand_as(kinds)
            both = torch.stack([(expected - kinds).clamp(min=0.0), expected], dim=1) @ share[:, None, :, None]
            maps.append(both.squeeze(-1).unflatten(2, grid))
        gap, whole = self.smoother(maps, size, [bank.member.align_corners for bank in banks]).split(1, dim=1)
        little = lacking.sum(1)  # of what is unusual; the rest is too much of something
        share = little.square() / (little.square() + (1 - little).square())
        return share[:, None, None, None] * gap / whole.amax((1, 2, 3), keepdim=True).clamp(min=LEAST_PLACED)


def _on_grid(scores: PatchScores, grid: tuple[int, int], finest: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bring the position cost (B, 1, h, w) and the matched position (B, 2, h, w) to the finest grid, nearest."""
    cost = scores.position.unflatten(1, grid).unsqueeze(1)
    matched = scores.matched.transpose(1, 2).unflatten(2, grid)
    if grid == finest:
        return cost, matched
    return F.interpolate(cost, size=finest, mode="nearest"), F.interpolate(matched, size=finest, mode="nearest")


def _most_misplaced(matched: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the matched positions (B, 2, h, w) of the member that finds a patch most out of place."""
    cost, position = matched[0]
    for other_cost, other_position in matched[1:]:
        position = torch.where(other_cost > cost, other_position, position)
        cost = torch.maximum(cost, other_cost)
    return position
