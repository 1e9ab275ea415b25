"""Configs of earlier format versions: what has another default since then is written down as it was, so that a
checkpoint keeps what it was trained with."""


def upgrade(fields: dict) -> dict:
    """The fields of a saved config, of whatever version, as those of the present one."""
    if fields.get("format_version", 1) >= 2:
        return fields
    fields = {**fields, "format_version": 2}
    decoder = fields.get("decoder")
    if decoder == "conv":
        before = {"embed": True, "hidden": "token", "layer_norm_eps": 1e-6}
        fields["decoder_config"] = {**before, **(fields.get("decoder_config") or {})}
    if fields.get("encoder") == "native":
        fields["encoder_config"] = {
            "final_norm_names": ["layernorm", "layer_norm", "norm"],
            **(fields.get("encoder_config") or {}),
        }
    if fields.get("target") is not None:
        fields["target_config"] = _target_of_version_1(fields["target"], fields.get("target_config") or {})
    return fields


def _target_of_version_1(name: str, options: dict) -> dict:
    if name == "frequency":
        return {"average_spectra": False, **options}
    if name == "hog":
        return {"window": True, "angle_from": "horizontal", **options}
    if name == "moving_average":
        return {"global_head": "mlp", "reduction": "mean", **options}
    if name in ("token_morphing", "discrete_token") and isinstance(options.get("features"), dict):
        features = dict(options["features"])
        wrapped = features.pop("name", None)
        return {**options, "features": {"name": wrapped, **_target_of_version_1(wrapped, features)}}
    return options
