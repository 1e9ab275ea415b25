"""The model: configuration, encoders, mask generators, decoders, targets and poolers."""

if __name__ != "hf_mim.modeling":
    # A second copy of every class would be registered nowhere and equal to nothing.
    raise ImportError(f"this folder is the package 'hf_mim.modeling': write 'import hf_mim.modeling', not '{__name__}'")
