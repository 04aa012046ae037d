"""What comes after training, a room for each verb of `python -m lora_engine`."""
