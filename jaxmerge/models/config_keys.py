"""What a Hugging Face config says of the computation, and what it says besides: the one list.

The decoder's families, and the comparison of models that are merged by tensor, ask here. A key that
is not listed could matter: the decoder refuses it, and models that are merged must agree in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys that do not change what a model computes from tokens, whatever their value.
SILENT = frozenset(
    """
    _name_or_path architectures auto_map transformers_version transformers.js_config dtype
    torch_dtype torchscript use_bfloat16 tf_legacy_loss base_model_tp_plan base_model_pp_plan
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    attn_implementation _flash_attn_2_enabled _experts_implementation _commit_hash
    gradient_checkpointing use_flash_attn use_flash_attention use_flash_attention_2
    use_memory_efficient_attention use_cache use_cache_quantization use_cache_kernel
    cache_implementation pretraining_tp is_llama_config is_composition
    unsloth_fixed unsloth_version unsloth_tokenizer unsloth_training_tiled_mlp
    tokenizer_class tokenizer tokenizer_pad_token name license language tags library_name
    attention_dropout attn_pdrop embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob
    attention_probs_dropout_prob resid_pdrop residual_dropout classifier_dropout dropout
    classifier_dropout_prob activation_dropout summary_first_dropout
    initializer_range initializer_factor init_std rescale_prenorm_residual
    router_aux_loss_coef router_jitter_noise router_z_loss_coef problem_type loss_type
    output_attentions output_hidden_states output_router_logits return_dict use_return_dict
    bos_token_id eos_token_id pad_token_id sep_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id task_specific_params
    finetuning_task prefix begin_suppress_tokens suppress_tokens
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty output_scores return_dict_in_generate
    """.split()
)

# How long a text may be. It says nothing of what is computed, unless rotary positions are scaled by
# it; tables of learned positions have a shape, which is compared by itself.
_LENGTHS = frozenset("max_position_embeddings model_max_length max_sequence_length".split())

# Silent for a decoder too: how texts are drawn (elsewhere top_k may be a number of experts), names
# of classes, which it has none of, and keys out of which transformers has made others that are
# heeded (layer_types, ...) by the time that a family reads them. Families heed the length that
# rotary positions need.
DECODER_SILENT = SILENT | frozenset(
    """
    model_type id2label label2id num_labels tie_last_hidden_states temperature top_k top_p
    model_max_length max_sequence_length max_seq_length
    _sliding_window_pattern sliding_window_pattern max_window_layers no_rope_layer_interval
    """.split()
)

# Keys that say nothing at this value: they ask for what the decoder does anyway.
NEUTRAL: dict[str, Any] = {
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": True,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "use_mrope": False,
    # Of checkpoints of Command R7B and Phi-4 on the Hub; transformers does not read them.
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}

# Kinds of rotary positions that are scaled by how long a text may be.
_BY_LENGTH = ("dynamic", "yarn", "longrope", "su")


def heeded(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a config, and the configs within it, say of the computation.

    Args:
        config: as it is written, or as transformers completes it.
    """
    length = _scaled_by_length(config)
    return {
        name: heeded(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in SILENT and (length or name not in _LENGTHS)
    }


def without_neutral(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same without what is off: for configs that transformers has completed with defaults.

    Before that a missing key need not mean that it is off.
    """
    return {
        name: without_neutral(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not None and (value or name not in NEUTRAL or NEUTRAL[name] != value)
    }


def _scaled_by_length(config: Mapping[Any, Any]) -> bool:
    """Whether rotary positions depend on the length that is set aside."""
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if not isinstance(found, dict):
            continue
        for each in (found, *(value for value in found.values() if isinstance(value, dict))):
            if each.get("rope_type", each.get("type")) in _BY_LENGTH:
                return True
    return False
