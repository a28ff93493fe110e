"""What a fit keeps of the samples that it reads, and the features that it ranks from it."""
