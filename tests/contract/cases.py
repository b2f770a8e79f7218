"""What Trainers, loaders and users do to a callback: 72 cases, 1 to 71 and 24b, and the tests that cover each of them.

A test is named by its file below ``tests`` and its function. A case that does not apply, or only where there is a GPU,
says why.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """One case.

    Attributes:
        what: The case in words.
        tests: Tests that cover it.
        why_not: Why it does not apply, or what of it is not covered; empty if nothing is missing.
    """

    what: str
    tests: tuple[str, ...]
    why_not: str = ""


def case(what: str, *tests: str, why_not: str = "") -> Case:
    """A case; a test that begins with ``::`` is in the file of the one before it."""
    named: list[str] = []
    for test in tests:
        named.append(test if not test.startswith("::") else named[-1].partition("::")[0] + test)
    return Case(what, tuple(named), why_not)


KINDS = "loading/test_loader_filter.py::test_only_kept_samples_are_drawn_once_each"
LOADERS = "contract/test_loaders.py::test_removed_samples_are_never_drawn_again"
RANKS = "loading/test_loader_filter_ddp.py::test_processes_take_equally_many_steps_to_the_same_weights"

CASES: dict[str, Case] = {
    "1": case("a loader that shuffles", KINDS, LOADERS),
    "2": case("its own generator", KINDS, LOADERS),
    "3": case("weighted draws", "loading/test_loader_filter.py::test_weighted_draws", LOADERS),
    "4": case("torch's batch sampler", KINDS, LOADERS),
    "5": case("a user's batch sampler", KINDS, LOADERS),
    "6": case("lists of positions without batching", KINDS),
    "7": case("a worker process", KINDS, LOADERS),
    "8": case("a persistent worker", KINDS, LOADERS),
    "9": case("a loader whose constructor cannot be called again", KINDS, LOADERS),
    "10": case(
        "last batch dropped, accumulated gradients",
        "loading/test_loader_filter.py::test_drop_last_and_accumulation",
        LOADERS,
    ),
    "11": case("limit_train_batches", "loading/test_loader_filter.py::test_limit_train_batches"),
    "12": case("overfit_batches", "loading/test_loader_filter.py::test_overfit_batches"),
    "13": case(
        "fast_dev_run",
        "loading/test_loader_filter.py::test_fast_dev_run",
        "contract/test_lifecycle.py::test_a_fit_without_training_is_refused_or_silent",
    ),
    "14": case(
        "datamodule, module or loader, asked once",
        "loading/test_loader_filter.py::test_data_sources_are_asked_as_often_as_before",
    ),
    "15": case(
        "a reload in every epoch",
        "loading/test_loader_filter.py::test_data_sources_are_asked_as_often_as_before",
        "callbacks/test_rewind.py::test_data_are_reloaded_in_the_epochs_in_which_a_new_run_does",
    ),
    "16": case("list, dict, CombinedLoader", "loading/test_loader_filter.py::test_combined_loaders", LOADERS),
    "17": case(
        "val_check_interval",
        "loading/test_loader_filter.py::test_validation_within_the_epoch",
        "::test_a_validation_interval_longer_than_the_epoch_is_shortened_aloud",
        "::test_validation_by_steps_over_epochs",
    ),
    "18": case("no validation", "loading/test_loader_filter.py::test_without_validation"),
    "19": case(
        "loaders that cannot be curated", "loading/test_loader_filter_guards.py::test_loaders_that_cannot_be_curated"
    ),
    "20": case(
        "masks that leave nothing, no batch, a lone sample",
        "loading/test_loader_filter_guards.py::test_masks_that_leave_nothing_or_do_not_fit",
        "::test_a_lone_last_sample_is_left_out_where_batch_norm_needs_two",
    ),
    "21": case("a mask that is lifted", "loading/test_loader_filter.py::test_a_lifted_mask_brings_all_samples_back"),
    "22": case(
        "installed and never acting",
        "loading/test_loader_filter.py::test_a_callback_that_removes_nothing_changes_no_bit",
        "contract/test_silence.py::test_where_nothing_is_found_the_training_is_bit_identical",
    ),
    "23": case(
        "the user's loader afterwards, a second fit, the same Trainer twice",
        "loading/test_loader_filter_life.py::test_user_objects_come_back_as_they_were",
        "contract/test_lifecycle.py::test_a_second_fit_with_the_same_callback",
        "::test_the_same_trainer_twice",
    ),
    "24": case(
        "an error in a fit, then another fit",
        "contract/test_lifecycle.py::test_after_an_error_in_the_middle_everything_is_back_and_the_next_fit_works",
        "loading/test_loader_filter_life.py::test_an_error_leaves_no_wrapper_behind_and_the_next_fit_works",
    ),
    "24b": case(
        "two callbacks on one Trainer",
        "loading/test_loader_filter_life.py::test_masks_of_two_defences_are_joined",
        "contract/test_composition.py::test_three_filters_cut_all",
    ),
    "25": case(
        "batch-size finder, learning-rate finder, weight averages, a schedule of accumulation",
        "contract/test_settings.py::test_the_batch_size_finder",
        "::test_the_learning_rate_finder",
        "::test_stochastic_weight_averaging",
        "loading/test_loader_filter_life.py::test_weight_averaging_and_accumulation_schedules_and_early_stopping",
    ),
    "26": case(
        "a one-cycle schedule",
        "loading/test_loader_filter.py::test_one_cycle_ends_early_without_an_error",
        "contract/test_settings.py::test_a_one_cycle_schedule_is_not_asked_to_go_beyond_its_end",
    ),
    "27": case(
        "a dataset that changes its size",
        "loading/test_loader_filter_guards.py::test_a_dataset_that_changes_its_size_at_a_reload",
        "contract/test_bad_input.py::test_a_dataset_that_changes_its_size_is_refused_once_positions_count",
    ),
    "28": case("two processes that shuffle", RANKS, "::test_each_kept_sample_once"),
    "29": case("weighted draws in two processes", RANKS, "::test_draws_with_replacement"),
    "30": case(
        "an odd number of samples in two processes",
        "loading/test_loader_filter_ddp.py::test_odd_numbers_are_filled_up_or_cut",
    ),
    "31": case(
        "a user's distributed sampler, and a class derived from it",
        RANKS,
        "::test_unknown_sharding_is_filtered_and_filled_up",
    ),
    "32": case(
        "use_distributed_sampler=False with own batches",
        "loading/test_loader_filter_ddp.py::test_unknown_sharding_is_filtered_and_filled_up",
    ),
    "33": case("a combined loader that is reloaded in two processes", RANKS, "::test_each_kept_sample_once"),
    "34": case(
        "processes that Lightning starts by itself",
        "loading/test_loader_filter_ddp.py::test_processes_started_by_lightning",
    ),
    "35": case("resumed after pruning", "loading/test_resume.py::test_a_run_resumed_after_pruning_stays_pruned"),
    "36": case(
        "resumed from the checkpoint of a validation",
        "loading/test_resume.py::test_the_checkpoint_written_before_pruning_is_healed",
        "contract/test_resume.py::test_resumed_between_epochs_and_after_validation_it_ends_the_same",
    ),
    "37": case(
        "resumed in the middle of an epoch",
        "loading/test_resume.py::test_in_the_middle_of_an_epoch",
        "contract/test_resume.py::test_resumed_in_the_middle_of_an_epoch_it_goes_on_with_what_it_knew",
    ),
    "38": case(
        "a callback that is added on resume",
        "loading/test_resume.py::test_a_callback_that_is_added_on_resume_leaks_nothing",
        "contract/test_resume.py::test_added_on_resume_it_acts_on_what_is_left",
    ),
    "39": case(
        "checkpoints load with weights_only=True",
        "contract/test_resume.py::test_the_checkpoints_of_lightning_resume_and_load_safely",
        "contract/test_trust.py::test_a_checkpoint_that_would_run_code_is_refused",
    ),
    "40": case(
        "two instances and their keys",
        "contract/test_outside.py::test_two_instances_of_one_class_are_told_apart_by_name",
        "contract/test_cases.py::test_a_derived_class_finds_the_state_and_two_of_one_key_are_refused",
    ),
    "41": case(
        "a checkpoint of two processes resumed in two, and in one",
        "loading/test_loader_filter_ddp.py::test_resumed_in_two_processes",
        "::test_resumed_in_one_process",
    ),
    "42": case("resumed on other data", "contract/test_resume.py::test_resumed_on_other_data_it_is_refused"),
    "43": case(
        "resumed and uninterrupted runs judge alike",
        "contract/test_resume.py::test_resumed_between_epochs_and_after_validation_it_ends_the_same",
    ),
    "44": case(
        "a scan from any hook leaves the training bit-identical",
        "scanning/test_isolation.py::test_training_is_bit_identical_with_scans",
    ),
    "45": case(
        "a scan with any workers, batch size, processes",
        "scanning/test_scan.py::test_workers_and_batch_size_do_not_matter",
        "::test_two_ranks_see_what_one_process_sees",
    ),
    "46": case(
        "modules that the user has frozen",
        "scanning/test_isolation.py::test_modes_stage_grad_and_log_come_back_after_an_error",
    ),
    "47": case(
        "a model that logs in its forward pass", "scanning/test_isolation.py::test_training_is_bit_identical_with_scans"
    ),
    "48": case(
        "augmentation that asks whether it is training",
        "scanning/test_isolation.py::test_scan_sees_the_validation_stage_and_no_augmentation",
        "callbacks/test_dbr.py::test_labels_mixed_on_the_device_do_not_matter",
    ),
    "49": case(
        "a module that keeps a tensor of its forward pass",
        "scanning/test_isolation.py::test_training_is_bit_identical_with_scans",
    ),
    "50": case(
        "batch norms that differ between processes", "scanning/test_scan.py::test_ranks_borrow_the_buffers_of_rank_zero"
    ),
    "51": case(
        "transforms that are swapped and put back",
        "data/test_transforms.py::test_random_before_fixed_inside_restored_after",
        "::test_restored_on_errors",
    ),
    "52": case(
        "collate functions that mix or drop samples",
        "data/test_views.py::test_is_replaced_with_one_warning",
        "::test_positions_of_what_a_collate_drops_are_left_out",
        "contract/test_dropped.py::test_samples_that_the_collate_drops_are_kept_and_counted",
    ),
    "53": case(
        "outputs of other kinds, no forward, probabilities",
        "scanning/test_outputs.py::test_unwraps_to_float32_logits",
        "::test_module_without_forward_answers_through_its_only_child",
        "::test_probabilities_warn_once_per_module",
        "contract/test_faults.py::test_answers_that_hold_logits_are_understood",
    ),
    "54": case(
        "the head of many architectures",
        "surgery/test_heads.py::test_head_and_features_of_timm_models",
        "::test_head_of_torchvision_models",
        "::test_convolutional_head_is_pooled_and_told",
        "::test_distilled_deit_takes_one_of_its_heads_and_says_so",
    ),
    "55": case(
        "compiled modules",
        "scanning/test_scan.py::test_compiled_module_gives_the_scores_of_the_eager_one",
        "surgery/test_heads.py::test_compiled_models_can_be_searched_and_tapped",
    ),
    "56": case("strategies that shard the model", "scanning/test_isolation.py::test_sharded_strategies_are_refused"),
    "57": case(
        "ascent beside a literal loop",
        "callbacks/test_dbr.py::test_the_steps_are_those_of_a_literal_loop",
        "loading/test_batch_schedule.py::test_without_a_head_or_bounds_the_whole_loss_changes_its_sign",
        "callbacks/test_dbr.py::test_suspects_come_first_with_the_other_sign_and_the_logged_loss_stays",
    ),
    "58": case(
        "manual optimization",
        "callbacks/test_dbr.py::test_manual_optimization_is_refused_before_anything_happens",
        "callbacks/test_none.py::test_manual_optimization_is_refused_before_anything_happens",
    ),
    "59": case(
        "in_order=False", "loading/test_batch_schedule.py::test_loaders_whose_batches_cannot_be_known_are_refused"
    ),
    "60": case(
        "what a batch holds is known",
        "callbacks/test_dst.py::test_labels_must_be_those_of_the_samples",
        "loading/test_batch_schedule.py::test_positions_of_a_place_are_those_that_are_drawn_there_in_any_epoch",
        LOADERS,
        why_not="no recorder stands around the user's samplers: where positions must be known, the batches are ours",
    ),
    "61": case(
        "the order of unlearning and relearning",
        "loading/test_batch_schedule.py::test_all_processes_change_over_at_the_same_step_and_together_draw_everything",
        "::test_one_phase_after_the_other_and_every_sample_once",
        "callbacks/test_dbr.py::test_bounded_it_alternates_freezes_batch_norms_and_gives_everything_back",
        "contract/test_resume.py::test_resumed_in_the_middle_of_an_epoch_it_goes_on_with_what_it_knew",
    ),
    "62": case(
        "16-mixed on a GPU", why_not="needs a GPU; scaled losses are covered on the CPU by trainer/test_phases.py"
    ),
    "63": case(
        "a training beside the training",
        "callbacks/test_dbr.py::test_the_look_is_invisible_to_the_training",
        "contract/test_processes.py::test_the_verdict_is_that_of_one_process",
    ),
    "64": case(
        "a rate of our own beside the user's schedule",
        "callbacks/test_none.py::test_the_rate_of_the_phase_is_in_the_optimizer_during_steps_alone",
        "::test_a_step_that_fails_leaves_the_users_rate",
        "::test_a_one_cycle_schedule_is_not_asked_to_go_beyond_its_end",
    ),
    "65": case(
        "frozen batch norms come back",
        "callbacks/test_none.py::test_batch_norm_statistics_stand_still_and_their_weights_learn",
        "contract/test_lifecycle.py::test_after_an_error_in_the_middle_everything_is_back_and_the_next_fit_works",
    ),
    "66": case(
        "a module that cannot be copied",
        "contract/test_cases.py::test_a_module_that_cannot_be_copied_is_named",
    ),
    "67": case(
        "callbacks in Trainers of both packages",
        "test_lightning.py::test_one_callback_class_serves_both_packages",
        "contract/test_lifecycle.py::test_fit",
        "::test_a_callback_that_is_not_in_a_list",
    ),
    "68": case("one package alone", "test_lightning.py::test_one_package_is_enough"),
    "69": case(
        "command lines",
        "contract/test_outside.py::test_by_command_line",
        "callbacks/test_ultraclean_cli.py::test_help_explains_and_bad_values_are_refused",
    ),
    "70": case(
        "loggers and the folder of the logs",
        "contract/test_outside.py::test_loggers_and_progress_bars",
        "contract/test_processes.py::test_weights_and_state_are_the_same_everywhere",
    ),
    "71": case(
        "progress bars",
        "contract/test_outside.py::test_loggers_and_progress_bars",
        "scanning/test_scan.py::test_real_rich_display",
    ),
}
