"""What a viewer of reconstructions must know of how they were made."""

AS_PREDICTED = "Masked patches are as predicted."
WITH_TRUE_STATISTICS = (
    "Predicted patches are normalised; here they have the true patches' mean and contrast."
)
WITH_TRUE_CONTRAST = "Codes stand for normalised patches, drawn with the true patches' contrast."
AS_DECODED = "Masked patches are as the tokenizer decodes the predicted codes."


def of_pixels(*, normalized: bool) -> str:
    """Say what predicted pixels became."""
    return WITH_TRUE_STATISTICS if normalized else AS_PREDICTED
