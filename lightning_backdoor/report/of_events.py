"""The events of a fit in words and numbers: one sentence for the console, and the facts of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_backdoor.detection.diagnosis import undiagnosed
from lightning_backdoor.events import Event, own_label
from lightning_backdoor.report.evidence import Evidence, Table
from lightning_backdoor.report.explanation import heading, labels_sentence, trigger_sentence
from lightning_backdoor.report.of_whole_classes import signaled, signals_told, whole_table
from lightning_backdoor.report.sentences import LIMIT
from lightning_backdoor.verdict import Finding, Verdict

__all__ = [
    "evidence",
    "findings_told",
    "kept_majority",
    "last_word",
    "majorities",
    "nothing_learned",
    "reset_units",
    "sentence",
    "unsolved",
]

LITTLE = 0.5  # of the training images get their label
CHANCE = 0.05  # of the way from the most frequent label for all to no mistake
NAMED = 5  # labels in a warning, at most
TOLD = 3  # findings on the console, the largest ones
KEEP = "If they look fine, pass their positions as `approved` and train again: they will be kept."


def sentence(history: Sequence[Event], total: int, *, verdict: Verdict | None = None) -> str:
    """Say what the latest detection found, or what came of it.

    Args:
        history: All events so far, at least one.
        total: Samples of the training set.
        verdict: The verdict in force, for what its findings are; ``None`` leaves this out.
    """
    latest, wrong = history[-1], verdict is not None and _all_wrong(verdict)
    sentences = {"unlearn": _of_unlearning, "finetune": _of_fine_tuning, "two_stage": _of_two_stages}
    if latest.response in sentences:
        return sentences[latest.response](latest, total)
    if latest.rechecked or latest.response == "reset":
        return _of_reset(latest, total, wrong)
    return _of_fallback(latest) if latest.response == "fallback" else _of_filter(history, total)


def _all_wrong(verdict: Verdict) -> bool:
    """Whether there are findings, and the labels of all of them look wrong."""
    return bool(verdict.findings) and all(finding.diagnosis == "wrong labels" for finding in verdict.findings)


def unsolved(event: Event) -> bool:
    """Whether the latest sentence is a warning: something was found and could not be treated."""
    if event.response == "reset":
        undone = event.undone and not event.reassigned
        return bool(undone or (event.removed and not event.units) or event.no_room)
    return event.no_room


def last_word(event: Event, verdict: Verdict) -> str:
    """Say that a fit ends with a model that still gives removed images their label; else nothing.

    What was said of the latest round already, that it was undone or had no epochs, is not said again.

    Args:
        event: The latest one.
        verdict: The verdict at the end.
    """
    if not event.remains or event.undone or event.no_room:
        return ""
    rate, removed = event.flagged_label_rates[-1] or 0.0, len(verdict.removed)
    if event.response == "fallback":
        return (
            f"ends with a model that gives {rate:.1%} of the {removed:,} removed images their label, though it was "
            f"trained anew without them: {_why_still(event, verdict)}. Look at the report."
        )
    return (
        f"ends with a model that gives {rate:.1%} of the {removed:,} removed images their "
        f"label{_outcome(event, _all_wrong(verdict))}. To be sure, train anew without them."
    )


def _why_still(event: Event, verdict: Verdict) -> str:
    """Why a model that never saw the removed images may give them their label."""
    if _all_wrong(verdict):
        return "since their labels look wrong, other images with the same trigger may be left in the training set"
    kinds = ("a clean-label attack", "one kind of image")
    if any(finding.diagnosis == "right labels" for finding in verdict.findings):
        every = all(finding.diagnosis == "right labels" for finding in verdict.findings)
        return f"{'' if every else 'of some '}their labels look right ({kinds[0]}, or {kinds[1]})"
    if own_label(event):
        return f"their labels may be right ({kinds[0]}, or {kinds[1]})"
    return "part of the backdoor may still be there, by images with the same trigger that are left in the training set"


def findings_told(
    verdict: Verdict, classes: Sequence[str] | None = None, *, approved: bool, diagnosis_follows: bool = False
) -> str:
    """Say of the largest findings what is known of their labels, after a space; empty where nothing is.

    Args:
        verdict: The verdict.
        classes: Class names, indexed by label.
        approved: Whether the defense has an argument of this name, by which images are kept.
        diagnosis_follows: Whether findings without a diagnosis will have one at the end of training.
    """
    later = undiagnosed(verdict.findings) if diagnosis_follows else []
    known = [
        one
        for one in verdict.findings
        if one.own_label_rate is not None or one.estimated_asr is not None or any(one is each for each in later)
    ]
    if not known:
        return ""
    evidence, parts = Evidence(classes=classes, diagnosis_follows=diagnosis_follows), []
    for finding in sorted(known, key=len, reverse=True)[:TOLD]:
        parts.append(f"{heading(finding, evidence)}: {labels_sentence(finding, evidence)}")
        if finding.estimated_asr is not None:
            parts.append(trigger_sentence(finding, evidence))
        if approved and finding.diagnosis != "wrong labels" and finding.own_label_rate is not None:
            parts.append(KEEP)
    return "".join(f" {part}" for part in parts)


def nothing_learned(event: Event, verdict: Verdict) -> str:
    """Say that a verdict tells nothing, since the model gives its label to hardly more samples than by one answer.

    Args:
        event: The latest detection.
        verdict: Its verdict.
    """
    if event.removed or event.rechecked or not event.accuracies or verdict.labels is None:
        return ""
    counts = torch.unique(verdict.labels[verdict.labels >= 0], return_counts=True)[1]
    frequent = float(counts.max() / counts.sum())
    if event.accuracies[0] > frequent + CHANCE * (1 - frequent):
        return ""
    return (
        f"has no verdict on these data: the model has learned nothing. It gives {event.accuracies[0]:.0%} of the "
        f"training images their label, and one answer to all of them would be right for {frequent:.0%}. Look at the "
        "learning rate, or train longer before the detection."
    )


def majorities(
    verdict: Verdict, before: Verdict | None, *, name: str = "callback.verdict", callback: str | None = "this callback"
) -> str:
    """Say of which labels a verdict removes most samples, and more of them than the one before; else nothing.

    Args:
        verdict: The verdict.
        before: The one before, if there was one.
        name: How the user reaches the verdict.
        callback: What leaves samples out of the training that runs; ``None``: nothing does.
    """
    if verdict.labels is None:
        return ""
    without = "" if callback is None else f"without {callback} "
    present, places, counts = torch.unique(verdict.labels, return_inverse=True, return_counts=True)
    removed = torch.bincount(places[~verdict.keep], minlength=len(present))
    earlier = removed.new_zeros(len(present))
    if before is not None:
        earlier = torch.bincount(places[~before.keep], minlength=len(present))
    most = ((2 * removed > counts) & (removed > earlier)).nonzero().squeeze(1).tolist()
    if not most:
        return ""
    told = [f"{int(removed[i])} of the {int(counts[i])} with label {int(present[i])}" for i in most[:NAMED]]
    further = f", and most of those with {len(most) - NAMED} more labels" if len(most) > NAMED else ""
    return (
        f"takes most images of a label for poisoned: {', '.join(told)}{further}. Either they carry a trigger, "
        "or they are a kind of image that no other label has (of another camera, with a border), which the model will "
        "then not know. Look at them in the report. To keep those of label k and leave out the others, train "
        f"{without}on `torch.utils.data.Subset(dataset, positions)`, where `positions` are "
        f"`({name}.keep | ({name}.labels == k)).nonzero().flatten().tolist()`."
    )


def kept_majority(finding: Finding, place: int, verdict: Verdict, *, name: str = "callback.verdict") -> str:
    """Say that a finding is kept because it is most of its label, and what to do in either case.

    Args:
        finding: It.
        place: Its index among the findings of the verdict.
        verdict: The verdict.
        name: How the user reaches the verdict.
    """
    size = 0 if verdict.labels is None else int((verdict.labels == finding.label).sum())
    figures = ", ".join(f"{one.name} {one.value:.3g} {one.relation} {one.bound:.3g}" for one in finding.figures)
    return (
        f"keeps {len(finding):,} of the {size:,} images with label {finding.label}, though they stand out "
        f"({finding.gate}: {figures}). They are most of the label, and nothing says that they are poisoned rather than "
        "the class itself, which the model would not know without them. Look at them in the report. If they are fine, "
        f"name `{name}.findings[{place}].positions` as `approved`. If they carry a trigger, train without "
        f"these positions, or set {LIMIT} to 1."
    )


def reset_units(history: Sequence[Event]) -> set[tuple[str, int]]:
    """Layer and number of every unit that was reset, in one round or in several."""
    return {(layer, unit) for event in history for layer, unit, *_ in event.units}


def _of_filter(history: Sequence[Event], total: int) -> str:
    """Of the responses that change the samples alone, and of a report."""
    *earlier, latest = history
    before = sum(event.removed for event in earlier)
    if latest.response == "report":
        found = before + latest.removed
        return f'looked at {total:,} training images: {found:,} stand out; response="report" changes nothing.'
    then = "; training starts again on the rest" if latest.restarts else ""
    if not before:
        little = "" if latest.removed else _little_learned(latest.accuracies)
        return f"looked at {total:,} training images: {latest.removed:,} removed{then}.{little}"
    if not latest.removed:
        told = f"nothing new was found; {before:,} stay removed.{_of_labels(latest)}"
        return f"looked again at {total:,} training images: {told}"
    return (
        f"looked again at {total:,} training images: {latest.removed:,} more removed, {before + latest.removed:,} in "
        f"all{then}."
    )


def _of_reset(event: Event, total: int, wrong: bool) -> str:
    rates = event.flagged_label_rates
    before = rates[0] if rates else None
    if event.rechecked:
        return (
            f"at the end of training: accuracy on training images {event.accuracies[0]:.1%}; of {event.rechecked:,} "
            f"removed images {before or 0.0:.1%} are given their label{_outcome(event, wrong)}.{_of_labels(event)}"
        )
    if not event.units and event.no_room:
        given = "" if before is None else f", {before:.1%} of all that are removed given their label"
        return (
            f"looked at {total:,} training images: {event.removed:,} removed{given}, no unit reset, since no epoch is "
            "left for fine-tuning: the backdoor may still be there. Allow some (`extra_epochs`), or train anew without "
            "the removed images."
        )
    if not event.units and not event.removed and before is not None:
        return (
            f"looked again at {total:,} training images: nothing new was found; of the images removed before "
            f"{before:.1%} are given their label{_outcome(event, wrong)}."
        )
    if not event.units:
        unmet = ", but no unit that they drive can be reset: the backdoor may still be there" if event.removed else ""
        little = "" if event.removed else _little_learned(event.accuracies)
        return f"looked at {total:,} training images: {event.removed:,} removed, no unit reset{unmet}.{little}"
    layers = len({layer for layer, *_ in event.units})
    units = f"{len(event.units):,} units of {layers} layers reset"
    if not event.treated:
        return f"looked at {total:,} training images: {event.removed:,} removed, {units}; fine-tuning follows."
    accuracy = f"accuracy on training images {event.accuracies[0]:.1%} -> {event.accuracies[-1]:.1%}"
    given = ""
    if before is not None and rates[-1] is not None:
        given = f", of removed images given their label {before:.1%} -> {rates[-1]:.1%}"
    return f"after fine-tuning: {accuracy}{given}{_outcome(event, wrong)}."


def _harm(event: Event) -> str:
    """Which class a step that was undone cost too much, in brackets after a space."""
    if event.harmed is None:
        return ""
    label, before, after = event.harmed
    return f" (label {label}: {before:.1%} -> {after:.1%} of its images given it)"


def _of_labels(event: Event) -> str:
    """What the model makes of kept and of removed images of the labels in question, as a sentence after a space."""
    if not event.of_labels:
        return ""
    told = [
        f"label {label}: {kept:.1%} of its kept images get it, {removed:.1%} of its removed ones"
        for label, kept, removed in event.of_labels
    ]
    return f" {'; '.join(told)[0].upper()}{'; '.join(told)[1:]}."


def _outcome(event: Event, wrong: bool) -> str:
    """What followed from a round that is over, for the end of a sentence.

    Args:
        event: The round.
        wrong: Whether the labels of all findings look wrong.
    """
    if event.reassigned:
        return "; the model gives the removed images their label without having seen them, so all of this was undone"
    if event.undone:
        cost = f"; the rounds cost too much accuracy{_harm(event)}"
        return f"{cost}, so the weights went back: the backdoor may still be there"
    if not event.remains:
        return ""
    if own_label(event) and wrong:
        return "; the backdoor may still be there"
    if own_label(event):
        return (
            "; the backdoor may still be there, or these may be clean images of one kind or have true labels "
            "(clean-label attack): look at the report"
        )
    return "; part of the backdoor may still be there"


def _of_unlearning(event: Event, total: int) -> str:
    if event.no_room:
        found = f"{event.suspects:,} are suspect" if event.suspects else f"{event.trusted:,} are trusted"
        return (
            f"looked at {total:,} training images: {found}, and no epoch is left for a repair: a backdoor may still be "
            "there. Allow some epochs (`extra_epochs`), or train anew without the suspect images."
        )
    if not event.suspects and event.left_out:
        return (
            f"looked at {total:,} training images: {event.left_out:,} are suspect. They are left out of training, not "
            "unlearned, since their labels may be right."
        )
    if not event.suspects and not event.treated:
        return f"looked at {total:,} training images: nothing stands out, nothing to repair."
    left_out = f"; {event.left_out:,} others are left out, since their labels may be right" if event.left_out else ""
    if event.at_end is not None:
        accuracy, given = event.at_end
        return (
            f"at the end of training: accuracy on training images {accuracy:.1%}, of suspects given their label "
            f"{given or 0.0:.1%}.{_of_labels(event)}"
        )
    if not event.treated:
        return (
            f"looked at {total:,} training images: {event.suspects:,} will be unlearned, {event.trusted:,} learned "
            f"anew{left_out}."
        )
    accuracy, rate = event.outcome
    steps, undone = len(event.undone_steps), sum(event.undone_steps)
    epochs = f"{steps} epoch{'s' if steps > 1 else ''}"
    back = f"; {undone} of them cost too much accuracy{_harm(event)} and were undone" if undone else ""
    first = event.flagged_label_rates[0] or 0.0
    suspects = f", of suspects given their label {first:.1%} -> {rate or 0.0:.1%}" if event.suspects else ""
    return (
        f"after {epochs} of repair: accuracy on training images {event.accuracies[0]:.1%} -> {accuracy:.1%}{suspects}"
        f"{back}."
    )


def _of_fallback(event: Event) -> str:
    known = event.flagged_label_rates[0] if event.flagged_label_rates else None
    given = "" if known is None else f": {known:.1%} of the flagged images get their label"
    return f"could not repair the model{given}. Training starts again from its first weights, without these images."


def _of_fine_tuning(event: Event, total: int) -> str:
    if event.treated or event.no_room:
        return _of_unlearning(event, total)
    return f"on {event.trusted:,} of {total:,} images follows."


def _of_two_stages(event: Event, total: int) -> str:
    if not event.suspects:
        return f"looked at {total:,} training images: nothing stands out, nothing to do."
    groups = f"{event.trusted:,} trusted, {event.suspects:,} suspect"
    if event.losses and event.accuracies:
        ended = (
            " It ended before the second stage: the classifier is the one learned beside the first." * event.ended_early
        )
        return (
            f"trained {len(event.losses)} epochs on {total:,} images ({groups}): {event.accuracies[-1]:.1%} of the "
            f"trusted ones get their label.{ended}"
        )
    if event.agreement and event.agreement[-1][0] == event.feature_epochs:
        return (
            f"learned features; of the neighbours of trusted images {event.agreement[-1][1]:.1%} have their label. "
            f"{event.became_trusted:,} uncertain images became trusted, {event.became_suspect:,} suspect: {groups}. "
            "The classifier comes next."
        )
    if not event.feature_epochs:
        return f"looked at {total:,} training images: {groups}. Ordinary training goes on without the suspect ones."
    return f"looked at {total:,} training images: {groups}. Features are learned first, the classifier next."


def _little_learned(accuracies: Sequence[float]) -> str:
    """A sentence, after a space, for a model that gives under half of the training images their label; else nothing."""
    if not accuracies or accuracies[0] >= LITTLE:
        return ""
    return (
        f" The model gives only {accuracies[0]:.0%} of the training images their label: it may not have learned a "
        "backdoor yet. Look again after more training."
    )


def evidence(
    history: Sequence[Event],
    verdict: Verdict,
    *,
    images: Callable[[Sequence[int]], Tensor],
    denoised: Callable[[Sequence[int]], Sequence[Tensor]] | None,
    read_with: str,
    classes: Sequence[str] | None,
    meaning: str,
    by_subpopulations: bool,
    seconds: float,
    max_removed: float,
) -> Evidence:
    """What the report shows beside the verdict that all events together led to.

    Args:
        history: All events so far, at least one.
        verdict: The verdict in force. What is said of a repair follows its diagnoses, as on the console.
        images: From dataset positions to pixels, see :class:`Evidence`.
        denoised: From dataset positions to denoised pixels.
        read_with: The transform by which the images were read, in words.
        classes: Class names, if there are any.
        meaning: One sentence that says what the score measures.
        by_subpopulations: Whether subpopulations were looked for.
        seconds: Duration of the last scan.
        max_removed: The user's ``max_removed``.
    """
    total = len(verdict)
    latest = next((event for event in reversed(history) if event.response != "fallback"), history[-1])
    found = [
        f"{label} (separation {gap:.1f}, found after {event.when})"
        for event in history
        for label, gap in event.subpopulations
    ]
    facts: dict[str, str | int | float] = {
        "scans after": ", ".join(event.when for event in history if event.response != "fallback"),
        "seconds of the last scan": round(seconds, 1),
        "images read with": read_with,
    }
    if by_subpopulations:
        facts["classes with a subpopulation"] = ", ".join(found) or "none"
    if latest.unconfident:
        facts["classes without a confident image"] = ", ".join(map(str, latest.unconfident))
    rewound = {event.restarts for event in history if event.removed and event.response in ("restart", "continue")}
    tables: dict[str, Table] = {}
    treatment = ""
    if latest.response == "reset":
        facts["units reset"] = len(reset_units(history))
        for number, event in enumerate(history, 1):
            if event.treated:
                facts[f"round {number}"] = sentence([event], total, verdict=verdict).rstrip(".")
        rows = [
            (number, layer, unit, _class_name(classes, label), round(score, 2))
            for number, event in enumerate(history, 1)
            for layer, unit, label, score in event.units
        ]
        if rows:
            tables["Units that were reset"] = ("round", "layer", "unit", "class", "score"), rows
        treatment = _treatment(history)
    if latest.response in ("unlearn", "finetune"):
        facts["images to unlearn"], facts["images to learn anew"] = latest.suspects, latest.trusted
        if latest.treated:
            facts["repair"] = sentence([latest], total, verdict=verdict).rstrip(".")
            head = ("epoch of repair", "accuracy on watched images", "suspects given their label", "undone")
            steps = zip(latest.accuracies, latest.flagged_label_rates, strict=True)
            tables["Repair, epoch by epoch"] = (
                head,
                [
                    (i, f"{accuracy:.1%}", f"{rate or 0.0:.1%}", "yes" if i and latest.undone_steps[i - 1] else "")
                    for i, (accuracy, rate) in enumerate(steps)
                ],
            )
            treatment = f"The model was repaired: {sentence([latest], total, verdict=verdict)}"
    if latest.response == "two_stage":
        facts |= {
            "images trusted": latest.trusted,
            "images suspect": latest.suspects,
            "became trusted, by their neighbours": latest.became_trusted,
            "became suspect, by their neighbours": latest.became_suspect,
        }
        if latest.losses:
            agreement = dict(latest.agreement)
            head = ("epoch", "stage", "loss", "neighbours of trusted images with their label")
            tables["Training, epoch by epoch"] = (
                head,
                [
                    (
                        epoch,
                        "features" if epoch <= latest.feature_epochs else "classifier",
                        f"{loss:.4f}",
                        f"{agreement[epoch]:.1%}" if epoch in agreement else "",
                    )
                    for epoch, loss in enumerate(latest.losses, start=1)
                ],
            )
            treatment = f"The model was trained in two stages: {sentence([latest], total, verdict=verdict)}"
    if history[-1].of_labels:
        facts["model at the last look"] = _of_labels(history[-1]).strip().rstrip(".")
    anew = [sentence([event], total, verdict=verdict) for event in history if event.response == "fallback"]
    if anew:
        facts["after the repair"] = " ".join(anew).rstrip(".")
        treatment = f"{treatment or 'No repair was possible.'} Flagged images kept their label, so training began anew."
    return Evidence(
        classes=classes,
        images=images,
        denoised=denoised,
        facts=facts,
        score_meaning=meaning,
        num_flagged_before_cap=max(0 if event.reassigned else event.num_flagged_before_cap for event in history),
        max_removed=max_removed,
        rewound=rewound.pop() if len(rewound) == 1 else None,  # some of the times is neither yes nor no
        acted=latest.response != "report",
        signals=signals_told(signaled(history), classes),
        treatment=treatment,
        tables={**tables, **whole_table(signaled(history), classes)},
    )


def _class_name(classes: Sequence[str] | None, label: int) -> str | int:
    return (str(classes[label]) if classes is not None and 0 <= label < len(classes) else "") or label


def _treatment(history: Sequence[Event]) -> str:
    """What rounds of resets did to the model, for a reader of the report."""
    treated = [event for event in history if event.units]
    if not treated:
        return ""
    units = reset_units(treated)
    layers = len({layer for layer, _ in units})
    text = f"{len(units):,} units of {layers} layers were reset, and the model was fine-tuned."
    if treated[-1].reassigned:
        return f"{text} This was undone: the model gave the removed images their label without having seen them."
    return f"{text} The last of this cost too much accuracy and was undone." if treated[-1].undone else text
