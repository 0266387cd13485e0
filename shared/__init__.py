"""What two or more services use; it never imports a service."""
