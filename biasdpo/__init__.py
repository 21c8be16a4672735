"""BiasDPO: see, label, train away and measure the bias of a language model (Allam, 2024, arXiv:2407.13928)."""

__version__ = "0.2.0"
