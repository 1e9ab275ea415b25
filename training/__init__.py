"""From images to a trained model and a score: recipes, data, training, probing and pictures."""

if __name__ != "hf_mim.training":
    # A second copy of every class would be equal to nothing.
    raise ImportError(f"this folder is the package 'hf_mim.training': write 'import hf_mim.training', not '{__name__}'")
