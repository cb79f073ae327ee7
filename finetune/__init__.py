"""Fine-tuning of Moshi: configuration, data, training, evaluation, generation, command line."""
