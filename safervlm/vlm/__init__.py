"""Vision-language models: the abstract interface (:mod:`safervlm.vlm.base`) and one module per model family."""
