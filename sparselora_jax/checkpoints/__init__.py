"""Reads and writes model files: Hugging Face, PEFT, packed, GGUF."""
