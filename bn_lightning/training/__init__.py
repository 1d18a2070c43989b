"""Base classes and callbacks for training any network on any data."""
