from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_backdoor.detection.decision import OF_LABEL
from lightning_backdoor.report import Evidence
from lightning_backdoor.report.sentences import Summary, number, percent, score, summarize
from lightning_backdoor.report.table import class_rows
from lightning_backdoor.verdict import Verdict
from tests.report.helpers import evidence, verdict


def told(judged: Verdict, settings: Evidence) -> Summary:
    return summarize(judged, "UltraClean", class_rows(judged), settings)


def test_nothing_found_has_its_own_sentence():
    summary = told(verdict(200, 0), evidence())
    assert summary.headline == "Nothing suspicious was found"
    assert "200 training images of 4 classes" in summary.looked
    assert "Nothing was removed" in summary.done
    assert "no proof that the data is clean" in summary.then


def test_found_says_how_many_and_in_which_class():
    summary = told(verdict(200, 20), evidence(rewound=True))
    assert summary.headline == "20 of 200 training images were removed"
    assert "20 images stand out from the rest (10 % of the training set)" in summary.found
    assert "All of them carry one label, “dog”" in summary.found
    assert "started again from its first weights on the 180 images" in summary.done
    assert "Nothing" not in " ".join(summary)


def test_a_share_of_the_removed_in_one_class_is_counted():
    judged = verdict(200, 20)
    judged.labels[:3] = 2
    assert "17 of them carry one label, “dog”" in told(judged, evidence()).found


def test_removed_over_several_classes_is_said():
    judged = verdict(200, 20)
    judged.labels[:20:2], judged.labels[1:20:4] = 0, 2
    assert "spread over 3 of 4 classes" in told(judged, evidence()).found
    assert "backdoors aim" not in told(judged, evidence()).found


@pytest.mark.parametrize(("rewound", "words"), [(False, "went on, with the weights"), (None, "from then on")])
def test_what_happened_to_the_weights_is_said(rewound, words):
    assert words in told(verdict(), evidence(rewound=rewound)).done


def test_capped_has_its_own_sentence():
    summary = told(verdict(200, 20), evidence(num_flagged_before_cap=60, max_removed=0.1))
    assert summary.headline == "20 of 200 training images were removed, then the limit was reached"
    assert "60 images (30 %) stood out, more than `max_removed=0.1` allows" in summary.found
    assert "only the 20 most suspicious were taken out" in summary.done
    assert "40 images that stood out are still in the training set" in summary.done
    assert "raise `max_removed`" in summary.then


def test_a_label_of_which_some_stay_has_its_own_sentence():
    judged = replace(verdict(200, 20), rule=f"subpopulation(strict: standardized_gap>=2.5, enrichment>=20), {OF_LABEL}")
    summary = told(judged, evidence(num_flagged_before_cap=24, max_removed=0.3))
    assert "24 images (12 %) stood out, more than the limit of a label allows" in summary.found
    assert "`max_removed" not in " ".join(summary)
    both = told(
        replace(judged, rule=f"{judged.rule}, max_removed(0.1)"), evidence(num_flagged_before_cap=24, max_removed=0.1)
    )
    assert "more than `max_removed=0.1` or the limit of a label allows" in both.found


def test_a_limit_that_leaves_nothing_to_remove_is_not_nothing_found():
    summary = told(verdict(200, 0), evidence(num_flagged_before_cap=1, max_removed=0.001))
    assert summary.headline.startswith("0 of 200 training images were removed, then the limit")
    assert "none was taken out" in summary.done


def test_a_limit_that_was_not_reached_is_not_mentioned():
    summary = told(verdict(200, 20), evidence(num_flagged_before_cap=20, max_removed=0.3))
    assert "limit" not in " ".join(summary)


def test_one_image_is_written_in_the_singular():
    summary = told(verdict(9, 1), evidence(rewound=True))
    assert summary.headline == "1 of 9 training images was removed"
    assert summary.found.startswith("One image stands out")
    assert summary.done.startswith("It was taken out")


def test_without_labels_no_class_is_named():
    summary = told(verdict(50, 5, labels=False), evidence())
    assert "label" not in summary.found
    assert "50 training images and gave" in summary.looked


def test_numbers_are_written_for_people():
    assert [number(value) for value in (12345, 0.123456, -1.5, "x", True)] == ["12,345", "0.1235", "−1.5", "x", "True"]
    assert number(float("inf")) == "∞"
    assert [percent(part, 100) for part in (0, 0.01, 5.06, 50, 99.99, 100)] == [
        "0 %", "< 0.1 %", "5.1 %", "50 %", "> 99.9 %", "100 %",
    ]  # fmt: skip
    assert [score(value) for value in (11.9, 3, 1234, -0.5)] == ["11.90", "3.000", "1234", "−0.5000"]


def test_a_treated_model_is_told_of_whether_images_were_removed_or_not():
    treatment = "7 units of 3 layers were reset."
    kept = told(verdict(200, 0), evidence(treatment=treatment))
    assert kept.headline == "No image was removed, the model was treated"
    assert kept.done == f"All 200 images stay in training. {treatment}"
    removed = told(verdict(200, 20), evidence(treatment=treatment))
    assert removed.done.endswith(f"kept. {treatment}")


def test_where_nothing_was_changed_the_page_does_not_say_that_images_are_gone():
    summary = told(verdict(200, 20), evidence(acted=False))
    assert summary.headline == "20 of 200 training images stand out"
    assert summary.done == "Nothing was changed. A new training without them would have 180 images."
    assert told(verdict(200, 1), evidence(acted=False)).headline == "1 of 200 training images stands out"
    capped = told(verdict(200, 20), evidence(acted=False, num_flagged_before_cap=60, max_removed=0.1))
    assert capped.headline == "60 of 200 training images stand out, more than the limit allows"
    assert capped.done.startswith("Nothing was changed. Within the limit a new training would leave out 20 of them.")


def test_a_class_that_may_carry_a_signal_is_in_the_summary_beside_what_else_was_found() -> None:
    plain, signals = verdict(removed=0), ("“dog” may carry a signal in all images.", "Look at them.")
    alone = summarize(plain, "X", class_rows(plain), evidence(signals=signals))
    assert "a class may carry a signal" in alone.headline
    assert alone.found.endswith(signals[0])
    assert alone.then == signals[1]
    assert "Nothing was removed" in alone.done
    some = verdict(removed=20)
    beside = summarize(some, "X", class_rows(some), evidence(signals=signals))
    assert beside.headline == summarize(some, "X", class_rows(some), evidence()).headline
    assert beside.found.endswith(signals[0])
    assert beside.then.endswith(signals[1])
