from kascade_sglang.compat import (
    AttentionBackend,
    build_dense_backend,
    is_plain_decoder_layer,
    key_value_caches,
    local_kv_heads,
    local_layers,
    require_plain_pool,
    write_kv,
)  # noqa
