"""The vision-language models: one surface (:mod:`safervlm.vlm.base`), one file a family."""
