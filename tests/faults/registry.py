"""Every fault by its id, and where it is tested: cases of this package carry the id, others are named here.

Sections: A an adapter against its base and other experts, B a mixture's config, C files, crashes and disks,
D security.
"""

from __future__ import annotations

FAULTS = [
    *(f"A{number}" for number in range(1, 28)),
    *(f"B{number}" for number in range(1, 22)),
    *(f"C{number}" for number in range(1, 14)),
    *(f"D{number}" for number in range(1, 8)),
]

_BAD = "experts/test_bad_inputs.py"
_ROW = f"{_BAD}::test_refused_by_name_and_nothing_touched"
_ANY_NAME = "faults/test_properties.py::test_any_name_of_an_expert_is_plain_or_refused"
_OVER = "tuner/test_load_checks.py::test_another_mixture_under_the_same_name_is_refused"
_READER = "experts/test_adapter.py"
_ALONE = "faults/test_properties.py::test_each_expert_alone_is_peft_with_that_adapter"
_NO_CODE = "package/test_layering.py::test_no_code_from_data"
_YAML = "io/test_strict_yaml.py::test_refusals"

# Fault -> tests, with the case in brackets where a table holds it.
NAMED: dict[str, list[str]] = {
    "A1": [f"{_ROW}[base of another name]", f"{_ROW}[base at another commit]"],
    "A2": [f"{_ROW}[wider base]", f"{_ROW}[other k/v heads]", f"{_ROW}[fewer layers]"],
    "A3": [f"{_ROW}[base of another class]"],
    "A4": [f"{_ROW}[other module names]"],
    "A5": [f"{_ROW}[module the base lacks]"],
    "A6": [f"{_BAD}::test_any_missing_tensors_are_noticed", f"{_ROW}[a layer missing]"],
    "A7": [f"{_BAD}::test_any_unknown_key_is_noticed", f"{_ROW}[unknown key]"],
    "A8": [f"{_ROW}[targets too narrow]", f"{_ROW}[targets too wide]"],
    "A9": [_ALONE],
    "A10": [_ALONE, f"{_READER}::test_ranks_scales_and_bits_are_those_of_peft"],
    "A11": [_ALONE, "conformance/test_equalities.py::test_one_hot_gates_are_peft_with_that_adapter"],
    "A12": [f"{_ROW}[LoraConfig.use_dora]", f"{_ROW}[DoRA, config denies it]"],
    "A13": [f"{_ROW}[LoraConfig.bias]"],
    "A14": [f"{_ROW}[LoraConfig.modules_to_save]"],
    "A15": [f"{_BAD}::test_every_field_of_lora_config_is_decided", f"{_ROW}[embedding]"],
    "A16": [f"{_READER}::test_conv1d_of_gpt2_whatever_its_flag_says"],
    "A17": ["faults/test_adapters.py::test_made_on_a_packed_base_and_loaded_on_the_whole_one"],
    "A18": [f"{_ROW}[vocabulary extended]"],
    "A20": [f"{_ROW}[a real LoHa]", f"{_ROW}[peft_type IA3]"],
    "A21": [f"{_BAD}::test_a_bad_value_anywhere_is_named", f"{_ROW}[NaN]"],
    "A22": [f"{_ROW}[dtype torch.float64]", f"{_READER}::test_dtype_stays_that_of_the_file"],
    "A23": [f"{_ROW}[dtype torch.int64]"],
    "A24": [f"{_ROW}[ranks of A and B differ]"],
    "A25": [f"{_ROW}[lora_alpha nan]", f"{_ROW}[lora_alpha -4]", f"{_ROW}[lora_alpha '16']"],
    "A26": [f"{_ROW}[r 0]", f"{_ROW}[r huge]", f"{_BAD}::test_a_rank_in_the_config_must_be_that_of_the_file"],
    "A27": ["faults/test_properties.py::test_any_flipped_bit_of_a_payload_is_caught"],
    "B2": [_ALONE, "tuner/test_config.py::test_warned_combination[one expert]"],
    "B5": ["tuner/test_config.py::test_names_of_experts"],
    "B6": [f"{_READER}::test_good_names_pass"],
    "B7": [
        f"{_ROW}[path part q_proj]",
        "tuner/test_peft_lifecycle.py::test_adapter_names_that_peft_could_not_save_are_refused[layers]",
        "faults/test_crashes.py::test_what_is_written_is_read_back",
    ],
    "B8": [f"{_ROW}[name '/abs']"],
    "B9": [f"{_ROW}[name 'a/b']"],
    "B10": [f"{_ROW}[name 'a.b']", _ANY_NAME],
    "B11": [f"{_ROW}[reserved __base__]"],
    "B12": [f"{_ROW}[config key twice]", _OVER],
    "B13": [f"{_READER}::test_same_file_twice_warns"],
    "B14": [f"{_ROW}[typo beside a folder]", f"{_ROW}[weights missing]"],
    "B15": ["faults/test_saved_mixtures.py::test_a_mixture_needs_none_of_the_adapters_it_was_made_from"],
    "B16": ["faults/test_registry.py::test_a_config_asks_for_nothing_that_the_base_says"],
    "B17": ["faults/test_registry.py::test_documents_say_what_to_import_first"],
    "B19": ["tuner/test_config.py::test_a_field_of_the_future_is_left_out_with_a_warning"],
    "B20": ["faults/test_golden_mixtures.py::test_it_loads_and_computes_what_it_did"],
    "B21": ["tuner/test_config.py::test_bytes_do_not_depend_on_hashing"],
    "C1": ["faults/test_properties.py::test_a_cut_anywhere_is_refused_by_the_name_of_the_file"],
    "C3": [f"{_ROW}[pickle only]", f"{_BAD}::test_pickle_only_on_the_hub"],
    "C4": ["faults/test_saved_mixtures.py::test_a_refused_load_leaves_the_base_ready_for_a_good_one"],
    "C5": [
        "faults/test_crashes.py::test_the_disk_is_full",
        "faults/test_crashes.py::test_the_n_th_write_fails",
        "faults/test_crashes.py::test_too_little_room_is_said_before_anything_is_written",
    ],
    "C6": [
        "faults/test_crashes.py::test_killed_while_it_saves",
        "faults/test_saved_mixtures.py::test_files_of_two_saves_are_noticed",
    ],
    "C7": [f"{_READER}::test_saving_over_the_open_file_is_safe"],
    "C8": [
        "faults/test_killed_training.py::test_killed_and_resumed_to_the_bit",
        "faults/test_killed_training.py::test_a_partial_checkpoint_is_skipped",
    ],
    "C9": ["faults/test_killed_training.py::test_a_named_checkpoint_that_would_be_another_run_is_refused"],
    "C10": ["training/test_router_mixin.py::test_resuming_is_exact_to_the_bit"],
    "C11": [f"{_BAD}::test_hub_id_offline_says_so"],
    "C12": [
        "tuner/test_peft_lifecycle.py::test_64_experts_of_ranks_1_to_16_in_one_mixture",
        f"{_READER}::test_opening_reads_no_values_when_a_header_is_wrong",
        f"{_READER}::test_values_are_checked_one_tensor_at_a_time",
    ],
    "C13": ["faults/test_properties.py::test_a_folder_is_replaced_as_a_whole_or_not_at_all"],
    "D1": ["faults/test_saved_mixtures.py::test_nothing_that_a_config_names_is_imported"],
    "D2": ["faults/test_saved_mixtures.py::test_nothing_that_a_config_names_is_imported"],
    "D3": [_NO_CODE, "package/test_layering.py::test_the_scan_sees_it[f(trust_remote_code=True)]"],
    "D4": [_NO_CODE, "package/test_layering.py::test_the_scan_sees_it[torch.load(p)]"],
    "D5": [f"{_YAML}[a: !!python/object/apply:os.system [ls]]"],
    "D6": [f"{_YAML}[no: 1]", f"{_YAML}[a: 1_0]"],
    "D7": [
        "experts/test_extraction.py::test_places_that_are_not_written_to",
        "faults/test_crashes.py::test_places_that_are_not_replaced",
    ],
}  # fmt: skip
