"""What in a recipe contradicts itself, found before any image is read."""

import math

from metricface.training.recipe import Recipe, Stage, Term, Watch, budget_seconds

# Losses that keep a vector for each class, which can start from class means.
WITH_CENTRES = ("CenterLoss", "ContrastiveCenterLoss", "DeepID2Loss")


def check(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that contradicts itself, before any image is read."""
    if not recipe.stages:
        raise ValueError("The recipe has no stages; give at least one, with a head or a loss.")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) != len(names):
        raise ValueError(f"Stage names must differ, since reports and checkpoints go by them; found {names}.")
    if recipe.budget is not None:
        budget_seconds(recipe.budget)
    for index, stage in enumerate(recipe.stages):
        _check_stage(stage, timed=recipe.budget is not None)
        if recipe.mining == "per_rank" and any(term.memory is not None for term in stage.terms()):
            raise ValueError(
                f"Stage {stage.name!r} has a memory, which holds the images of all ranks; leave mining: per_rank out."
            )
        _check_fade(recipe, index)
        _check_kept_heads(recipe, index)
    if recipe.compile and recipe.recompute:
        raise ValueError("torch.compile decides itself what to recompute; leave compile or recompute out.")
    for name in ("threads", "log_every", "checkpoint_every", "checkpoints_kept"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be above 0.")
    for name in ("test_share", "validation_share"):
        share = getattr(recipe.data, name)
        if not 0.0 < share < 1.0:
            raise ValueError(f"data.{name}={share} must lie between 0 and 1.")


def _check_stage(stage: Stage, *, timed: bool) -> None:
    where = f"Stage {stage.name!r}"
    _check_part(where, stage)
    _check_terms(where, stage)
    _check_look_alikes(where, stage)
    _check_schedules(where, stage)
    if timed and (stage.epochs is not None or stage.steps is not None):
        raise ValueError(
            f"{where} has its own length (epochs or steps), but the recipe's budget decides it. Set budget to null "
            "(--budget null), or leave epochs and steps out and set the stage's share of the budget."
        )
    if not timed and (stage.epochs is None) == (stage.steps is None):
        raise ValueError(
            f"{where} needs a length: set epochs or steps (one of them), or a budget for the whole recipe."
        )
    for name in ("share", "learning_rate", "epochs", "steps", "clip_norm", "objective_learning_rate", "chunk"):
        value = getattr(stage, name)
        if value is not None and not value > 0:
            raise ValueError(f"{where}: {name}={value} must be above 0.")
    if stage.chunk == 1 and stage.batch_norm == "train":
        raise ValueError(f"{where}: batch norms in training need more than one image at once; raise chunk above 1.")
    _check_watch(where, stage.watch)
    if not 0.0 < stage.layer_decay <= 1.0:
        raise ValueError(f"{where}: layer_decay={stage.layer_decay} must be above 0 and at most 1.")
    if stage.average is not None and not 0.0 < stage.average < 1.0:
        raise ValueError(f"{where}: average={stage.average} is the decay of an average; it lies between 0 and 1.")
    if not 0.0 <= stage.warmup < 1.0:
        raise ValueError(f"{where}: warmup={stage.warmup} is a share of the stage; it must lie in [0, 1).")


def _check_fade(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if stage.fade is None:
        return
    where = f"Stage {stage.name!r}: fade={stage.fade}"
    if not 0.0 < stage.fade <= 1.0:
        raise ValueError(f"{where} is a share of the stage; it must lie above 0 and at most at 1.")
    if index == 0:
        raise ValueError(f"{where}, but there is no stage before it whose objective could fade out.")
    if "PairBatchSampler" in (stage.sampler.name, recipe.stages[index - 1].sampler.name):
        raise ValueError(
            f"{where}: objectives on the pairs of a PairBatchSampler and on other batches cannot share batches."
        )


def _check_kept_heads(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not stage.keep_head:
        return
    if stage.class_means:
        raise ValueError(f"Stage {stage.name!r}: heads start from class_means or go on (keep_head); leave one out.")
    if index == 0:
        raise ValueError(f"Stage {stage.name!r} has keep_head, but there is no stage before it. Leave it out.")
    try:
        stage.kept_heads(recipe.stages[index - 1])
    except ValueError as error:
        raise ValueError(f"Stage {stage.name!r}: {error}") from error


def _check_watch(where: str, watch: Watch) -> None:
    if watch.at != sorted(set(watch.at)) or not all(0.0 < share < 1.0 for share in watch.at):
        raise ValueError(f"{where}: watch.at holds shares of the stage, rising between 0 and 1; found {watch.at}.")
    if not 0.0 < watch.factor < 1.0 or not watch.tolerance >= 0.0:
        raise ValueError(
            f"{where}: watch.factor must lie between 0 and 1, and watch.tolerance be 0 or more; found {watch.factor} "
            f"and {watch.tolerance}."
        )


def _check_part(where: str, part: Stage | Term) -> None:
    if (part.head is None) == (part.loss is None):
        raise ValueError(f"{where} needs either a head or a loss; found {'neither' if part.head is None else 'both'}.")
    if part.miner is not None and part.loss is None:
        raise ValueError(
            f"{where} has a miner but no loss; a head takes no mined triplets. Give a loss or drop the miner."
        )
    if part.partial_fc is not None and (part.head is None or not 0.0 < part.partial_fc <= 1.0):
        raise ValueError(
            f"{where}: partial_fc={part.partial_fc} is a share of a head's classes, above 0 and at most 1."
        )
    if part.memory is not None and (part.loss is None or not part.memory > 0):
        raise ValueError(f"{where}: memory={part.memory} is a number of images, above 0, beside the batch of a loss.")


def _check_terms(where: str, stage: Stage) -> None:
    names = [term.name for term in stage.plus]
    # Curves, schedules and dotted settings go by these names.
    if len({*names, "head", "loss"}) != len(names) + 2 or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"{where}: the names of its further terms (plus) must be different identifiers, and not head or loss, "
            f"which name its own; found {names}."
        )
    for term in stage.plus:
        _check_part(f"{where}: its term {term.name!r}", term)
        if not _is_weight(term.weight):
            raise ValueError(f"{where}: plus.{term.name}.weight={term.weight} must be finite and 0 or more.")
    if stage.class_means and all(term.head is None and not _has_centres(term) for term in stage.terms()):
        raise ValueError(
            f"{where} has class_means=True, but no head and no centres that could start from them. Leave it out."
        )


def _check_look_alikes(where: str, stage: Stage) -> None:
    asked = stage.look_alikes
    if asked is None:
        return
    if stage.sampler.name != "LookAlikeBatchSampler":
        raise ValueError(
            f"{where} has look_alikes, but its sampler is {stage.sampler.name}. Make it a LookAlikeBatchSampler, or "
            "leave look_alikes out."
        )
    if asked.every_steps is not None and asked.every_epochs is not None:
        raise ValueError(f"{where}: look_alikes are renewed by every_steps or by every_epochs; give one of them.")
    renewed = asked.every_steps is not None or asked.every_epochs is not None
    if renewed and asked.source == "head" and all(term.head is None for term in stage.terms()):
        raise ValueError(
            f"{where} renews look-alikes from class vectors (source: head), but has no head whose vectors would "
            "change. Make the source centroids or images, or leave every_steps and every_epochs out."
        )
    for name in ("neighbours", "every_steps", "every_epochs", "delay"):
        value = getattr(asked, name)
        if value is not None and not value > 0:
            raise ValueError(f"{where}: look_alikes.{name}={value} must be above 0.")
    if asked.max_cos is not None and not -1.0 <= asked.max_cos <= 1.0:
        raise ValueError(f"{where}: look_alikes.max_cos={asked.max_cos} is a cosine; it must lie in [-1, 1].")


def _check_schedules(where: str, stage: Stage) -> None:
    for key, schedule in stage.schedules.items():
        points = schedule.points
        if not points or not all(len(point) == 2 and math.isfinite(point[1]) for point in points):
            raise ValueError(
                f"{where}: schedules.{key} needs points [share of the stage, value], at least one; found {points}."
            )
        shares = [share for share, _ in points]
        if not all(0.0 <= share <= 1.0 for share in shares) or shares != sorted(set(shares)):
            raise ValueError(f"{where}: the shares of schedules.{key} must rise within [0, 1]; found {shares}.")
        if key.endswith(".weight") and not all(_is_weight(value) for _, value in points):
            raise ValueError(f"{where}: the weights of schedules.{key} must be 0 or more; found {points}.")


def _is_weight(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _has_centres(term: Term) -> bool:
    return term.loss is not None and term.loss.name in WITH_CENTRES
