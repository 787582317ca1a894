"""What tests share: tiny real models, adapters with random weights, example conversations."""
