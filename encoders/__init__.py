"""Raw images, audio and robot state to `Features`; one encoder per file, nothing imported here."""
