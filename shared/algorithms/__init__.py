"""Pure algorithms: tensors in, a NamedTuple of tensors out."""
