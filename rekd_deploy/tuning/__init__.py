"""The settings that serve fastest on the machine at hand, found by serving candidates. torch-free."""
