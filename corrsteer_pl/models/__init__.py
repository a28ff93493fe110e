"""Language models, sparse autoencoders, the sites where they meet, and decoding. No task is known here."""
