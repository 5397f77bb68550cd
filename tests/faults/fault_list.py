"""The fault list: what is injected, what is expected, and the tests that show it, or why one process cannot have it.

`tests` are functions by file and name, all their cases together; tests of the functions beneath stand beside black-box
ones. `make faults` runs them and writes the outcome into docs/reliability.md. Not here: the tests.
"""

from typing import Any

HERE = "tests/faults/"
CHECKPOINTS, DATA, BAD = (
    f"{HERE}test_checkpoint_faults.py::",
    f"{HERE}test_data_faults.py::",
    f"{HERE}test_bad_inputs.py::",
)
CAMPAIGNS, AROUND = f"{HERE}test_campaigns.py::", f"{HERE}test_surroundings.py::"
DAMAGED = f"{CHECKPOINTS}test_7_8_9_12_a_damaged_file_is_named_and_the_step_before_is_taken"
EVERY_FILE = f"{CHECKPOINTS}test_7_8_every_file_of_a_checkpoint_counts"
FULL_DISK = f"{CHECKPOINTS}test_5_6_a_disk_that_takes_no_more_ends_the_run_and_keeps_the_step_before"
BAD_INPUT = f"{BAD}test_a_bad_input_is_one_line_and_leaves_nothing"


def _item(number: int, inject: str, expected: str, *tests: str, why_not: str | None = None) -> dict[str, Any]:
    shown: dict[str, Any] = {"item": number, "inject": inject, "expected": expected, "tests": tests}
    return shown if why_not is None else shown | {"why_not": why_not}


ITEMS: tuple[dict[str, Any], ...] = (
    _item(
        1,
        "SIGKILL at random moments",
        "resumes at the last acknowledged step",
        f"{CAMPAIGNS}test_1_a_killed_run_loses_no_acknowledged_step",
        "tests/checkpoint/test_store.py::test_a_kill_at_any_moment_loses_no_acknowledged_step",
    ),
    _item(
        2,
        "SIGKILL between data and rename",
        "half-written directory ignored, removed at the next start",
        f"{CHECKPOINTS}test_2_a_half_written_step_is_ignored_and_removed",
        "tests/checkpoint/test_store.py::test_what_a_kill_leaves_behind_is_never_taken_for_a_checkpoint_and_is_removed",
    ),
    _item(
        3,
        "SIGKILL while an old checkpoint is removed",
        "no half-removed candidate",
        f"{CHECKPOINTS}test_3_a_half_removed_step_is_no_candidate_and_is_removed",
    ),
    _item(
        4,
        "power loss: what was not forced to the disk is gone",
        "the last acknowledged step loads",
        f"{CAMPAIGNS}test_4_a_power_loss_loses_no_acknowledged_step",
    ),
    _item(
        5,
        "disk full before and during a save",
        "one named error, the step before intact, nothing left",
        FULL_DISK,
        f"{CHECKPOINTS}test_5_too_little_space_is_refused_before_anything_is_written",
    ),
    _item(
        6,
        "EIO, a place that cannot be written",
        "early named error; checkpoints kept",
        FULL_DISK,
        f"{CHECKPOINTS}test_6_a_place_that_cannot_be_written_is_named_at_once",
    ),
    _item(7, "one bit flipped, each class of file", "detected, named, older step taken", DAMAGED, EVERY_FILE),
    _item(
        8, "first and last shard truncated, empty, missing", "detected, named, older step taken", DAMAGED, EVERY_FILE
    ),
    _item(
        9,
        "manifest missing, empty, malformed, of the future",
        "detected, named, older step taken; both versions named",
        DAMAGED,
        f"{CHECKPOINTS}test_9_a_manifest_of_the_future_names_both_versions",
        f"{CHECKPOINTS}test_9_a_manifest_that_is_none_is_named",
    ),
    _item(
        10,
        "stray extra shard, files of another step",
        "refused, named",
        f"{CHECKPOINTS}test_10_a_stray_shard_is_refused_and_named",
        f"{CHECKPOINTS}test_10_files_of_another_step_are_refused",
        f"{CHECKPOINTS}test_10_a_step_under_another_name_is_refused",
    ),
    _item(
        11,
        "two trainers, one run directory; stale lock",
        "the second refuses with the owner; stale lock taken over",
        f"{CHECKPOINTS}test_11_a_second_trainer_is_refused_and_told_the_owner",
        f"{CHECKPOINTS}test_11_a_stale_lock_is_taken_over_with_a_note",
        f"{CHECKPOINTS}test_11_a_lock_of_another_host_needs_force",
    ),
    _item(12, "newest checkpoint unreadable, older good", "the older one, loudly", DAMAGED),
    _item(
        13,
        "no checkpoint verifies",
        "exit 2, nothing removed",
        f"{CHECKPOINTS}test_13_if_no_checkpoint_verifies_nothing_is_started_and_nothing_removed",
    ),
    _item(
        14,
        "recipe, tokenizer or data changed",
        "refused with every difference",
        f"{CHECKPOINTS}test_14_another_run_is_refused_with_every_difference",
    ),
    _item(
        15,
        "other world size, tp, cp",
        "exact tensors, same data order",
        f"{CHECKPOINTS}test_15_another_cut_into_micro_batches_goes_on_with_the_same_data",
        why_not="needs several ranks; tested here: another cut into micro-batches",
    ),
    _item(16, "other dtype or shape", "named error with the tensors", f"{CHECKPOINTS}test_16_other_shapes_are_listed"),
    _item(
        17,
        "writer in the background dies",
        "noticed within one step; nothing points at its step",
        f"{CHECKPOINTS}test_17_a_writer_in_the_background_that_dies_is_noticed_within_a_step",
        "tests/checkpoint/test_saver.py::test_a_writer_that_dies_without_a_word_is_noticed",
    ),
    _item(
        24,
        "SIGTERM, SIGUSR1, SIGINT, doubled, at any time",
        "saved, exit 75; at once with 130 and 143 the second time or before the first step",
        f"{AROUND}test_24_a_signal_at_any_time_ends_as_promised",
        "tests/cli/test_pretrain.py::test_the_first_signal_finishes_the_step_saves_and_ends_with_75",
        "tests/cli/test_pretrain.py::test_the_second_signal_ends_at_once_and_the_run_can_go_on",
        "tests/cli/test_pretrain.py::test_a_signal_before_the_first_step_ends_without_a_checkpoint",
        "tests/training/test_loop.py::test_a_stop_during_evaluation_saves_the_step_and_evaluates_it_later",
    ),
    _item(
        25,
        "wall clock jumps",
        "no effect on saves, limits or rates",
        f"{AROUND}test_25_a_clock_that_jumps_changes_nothing",
    ),
    _item(
        26,
        "an id outside the vocabulary",
        "refused before the model, place named",
        f"{DATA}test_26_an_id_outside_the_vocabulary_never_reaches_the_model",
        "tests/data/test_shards.py::test_ids_outside_the_vocabulary_never_reach_the_cast",
        "tests/data/test_shards.py::test_a_model_with_a_smaller_vocabulary_is_refused",
    ),
    _item(
        27,
        "document starts not rising, or with another end",
        "refused at open, shard named",
        f"{DATA}test_27_document_starts_that_fall_are_refused_at_open",
        f"{DATA}test_27_document_starts_that_end_elsewhere_are_refused_at_open",
    ),
    _item(
        28,
        "tokens shorter by a byte",
        "refused at open, bytes named",
        f"{DATA}test_28_a_shard_of_another_length_is_refused_at_open",
        f"{DATA}test_28_a_shard_that_is_missing_is_named",
    ),
    _item(
        29,
        "shard replaced after the manifest",
        "`tokenize --verify` fails with both hashes",
        f"{DATA}test_29_a_shard_replaced_after_the_manifest_fails_the_check_with_both_hashes",
        f"{DATA}test_29_a_shard_of_another_store_fails_the_check",
    ),
    _item(
        30,
        "empty and odd documents, bad lines, bad encodings, a line of a gigabyte",
        "counted with places up to the limit, then an error; memory bounded",
        BAD_INPUT,
        f"{DATA}test_30_empty_documents_are_counted",
        f"{DATA}test_30_bad_lines_are_counted_up_to_the_limit_with_their_places_and_then_fail",
        f"{DATA}test_30_odd_text_comes_back_as_it_was",
        f"{DATA}test_30_34_a_long_line_takes_no_memory_of_its_length",
    ),
    _item(
        31,
        "tokenize killed at random moments",
        "the same bytes as an unbroken run",
        f"{CAMPAIGNS}test_31_33_a_killed_tokenize_ends_with_the_same_bytes",
    ),
    _item(
        32,
        "the same input twice, overlapping globs",
        "refused, both named",
        f"{DATA}test_32_the_same_file_by_two_names_is_refused",
    ),
    _item(
        33,
        "a worker is killed",
        "an error, never short data",
        f"{CAMPAIGNS}test_31_33_a_killed_tokenize_ends_with_the_same_bytes",
    ),
    _item(
        34,
        "a corpus larger than the memory allowed",
        "finishes within the bound",
        f"{DATA}test_30_34_a_long_line_takes_no_memory_of_its_length",
    ),
    _item(
        35,
        "another number of workers",
        "same order, same bytes",
        f"{DATA}test_35_the_number_of_workers_changes_no_byte",
    ),
    _item(
        36,
        "data shorter than a window",
        "refused with both lengths",
        f"{DATA}test_36_a_store_shorter_than_a_window_is_refused_with_both_lengths",
    ),
    _item(
        37,
        "loss spike, values that are not finite",
        "the policy is obeyed and logged; at most 3 rollbacks",
        "tests/training/test_rollback.py::test_three_bad_steps_go_back_and_their_samples_are_left_out",
        "tests/training/test_rollback.py::test_three_rollbacks_and_then_the_run_stops_with_a_report",
        "tests/training/test_rollback.py::test_a_spike_is_met_as_the_policy_says",
        "tests/cli/test_pretrain.py::test_a_run_whose_loss_is_not_finite_ends_with_5_and_says_where",
    ),
    _item(
        42,
        "weights with a 100-MB header, overlaps, doubled names; wrong architecture; no tokenizer",
        "named error before memory is taken",
        f"{BAD}test_42_weights_that_are_none_are_named_before_memory_is_taken",
        f"{BAD}test_42_another_architecture_is_named",
        f"{BAD}test_42_a_model_without_tokenizer_is_named",
    ),
    _item(
        45,
        "read-only HOME, no network, no shared memory, another locale, odd paths",
        "works, or one line",
        f"{AROUND}test_45_odd_surroundings_change_nothing",
        f"{AROUND}test_45_paths_may_hold_spaces_and_any_letters",
        f"{AROUND}test_45_without_a_network_the_hub_is_an_error_of_the_environment",
        f"{AROUND}test_45_a_port_or_a_pipe_is_no_text",
    ),
)
