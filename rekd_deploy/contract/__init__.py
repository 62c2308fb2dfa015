"""What all sides share: tensors, description, manifest. torch-free."""
