"""Indiana University chest X-ray reports with CheXpert labels."""
