"""Words that the page explains: methods and ways of replacing layers."""

METHODS = {
    "raw": "one ordinary sparse autoencoder per layer, which codes the stream itself",
    "raw_equal_total": "raw SAEs with more active latents in later layers: as many in total as the "
    "reconstruction of a ReSAE is made of",
    "identity": "a control: the prediction is the layer before itself, without a learned map",
    "resae": "autoencoders that code what an affine map from the layer before did not predict",
    "resae_online": "a ReSAE trained further while all layers are replaced, on the KL divergence "
    "to the unchanged model",
    "resae_closed": "a ReSAE trained on residuals against its own reconstructions",
    "all_previous": "a ReSAE whose maps predict from all selected layers before, not only the last",
    "affine_only": "a control without codes: the first selected layer stays as it is, and the maps "
    "predict all others from it",
    "mlsae": "one dictionary that all layers share",
    "hierarchical": "autoencoders trained to work at every smaller k, too",
    "raw_matched": "raw SAEs with as many active latents and as large dictionaries as a ReSAE "
    "reconstruction draws on",
    "raw_wide": "raw SAEs with, in every layer, as many latents as all layers of the ReSAE have",
    "raw_truncated": "raw SAEs of the largest k, cut down to a smaller one",
    "boost": "raw SAEs that never saw one domain of the text, and second ones beside them that "
    "were trained on it",
    "boost_base": "the same without the second ones",
}
"""Name of a method → what it is; only those in the report are explained."""

MODES_IN_WORDS = {
    "online": "each selected layer is replaced as the model reaches it, and the model runs on from "
    "there, so that later codes are made of a stream that earlier replacements have changed. This "
    "is what happens while the model writes text.",
    "teacher_forced": "the codes come from an unchanged pass of the model; a second pass puts "
    "their reconstructions in.",
    "error_added": "the reconstruction errors of an unchanged pass are added to the running "
    "stream, so that the errors of all layers count.",
}
"""Name of a mode → how layers are replaced in it."""
