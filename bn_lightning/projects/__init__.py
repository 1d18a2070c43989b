"""Projects of users: the command `new` creates them from `template/`, and updates them."""
