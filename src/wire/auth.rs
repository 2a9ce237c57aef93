//! Authentication, sans I/O: the server's requests in, our answers out.
//!
//! SCRAM-SHA-256 with channel binding where the connection has one, MD5 and clear text passwords.
//! The SCRAM exchange itself is `postgres-protocol`'s.
//!
//! # Invariants
//! A password leaves us in clear only when the server asks for it so and `require_auth` and
//! `channel_binding` allow it. A server that says "ok" before it has proved that it knows the SCRAM
//! password is refused.
//!
//! # Source
//! `pg_SASL_init`, `check_expected_areq` in `src/interfaces/libpq/fe-auth.c`.

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::frontend;
use secrecy::ExposeSecret;

use super::message::AuthRequest;
use super::options::Password;
use crate::error::{Error, Kind, Result};

/// Most iterations of SCRAM that `postgres-protocol` computes (its `MAX_ITERATION_COUNT`); a password set by
/// PostgreSQL has 4096, from 16 on as many as `scram_iterations` says.
const ITERATIONS_MAX: u32 = 100_000;

/// Whether the authentication is bound to the TLS connection (`channel_binding`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelBindingMode {
    Disable,
    Prefer,
    Require,
}

/// Methods of `require_auth`, in libpq's spelling; the last stands for no challenge at all.
const METHODS: [&str; 7] = ["password", "md5", "gss", "sspi", "scram-sha-256", "oauth", "none"];

/// Which methods the server may use (`require_auth`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequiredAuth {
    allowed: Vec<&'static str>,
}

impl RequiredAuth {
    /// Reads a list of methods, or of methods with `!` before each.
    pub(super) fn parse(list: Option<&str>) -> Result<Self> {
        let Some(list) = list else { return Ok(Self { allowed: METHODS.to_vec() }) };
        let refuse = |why: String| {
            Err(Error::new(Kind::Config, format!("unable to use require_auth: {why}")))
        };
        let entries: Vec<&str> = list.split(',').map(str::trim).collect();
        let negated = entries.iter().filter(|entry| entry.starts_with('!')).count();
        if negated != 0 && negated != entries.len() {
            return refuse("methods with and without '!' cannot be mixed".to_owned());
        }
        let mut named = Vec::new();
        for entry in entries {
            let name = entry.trim_start_matches('!');
            match METHODS.iter().find(|method| **method == name) {
                None => return refuse(format!("'{name}' is none of {}", METHODS.join(", "))),
                Some(method) if named.contains(method) => {
                    return refuse(format!("'{name}' is named more than once"));
                }
                Some(method) => named.push(method),
            }
        }
        let allowed = METHODS.iter().filter(|method| named.contains(method) == (negated == 0));
        Ok(Self { allowed: allowed.copied().collect() })
    }

    fn check(&self, method: &str) -> Result<()> {
        if self.allowed.contains(&method) {
            return Ok(());
        }
        let asked = match method {
            "none" => "lets us in without authentication".to_owned(),
            method => format!("asks for authentication by '{method}'"),
        };
        Err(Error::new(Kind::Denied, format!("the server {asked}, which require_auth forbids"))
            .hint("Change require_auth, or the method in the server's pg_hba.conf."))
    }
}

/// What an exchange needs to know.
pub(super) struct Credentials<'a> {
    pub(super) user: &'a str,
    pub(super) password: Option<&'a Password>,
    pub(super) channel_binding: ChannelBindingMode,
    pub(super) required: &'a RequiredAuth,
    pub(super) encrypted: bool,
    /// `tls-server-end-point` data of the connection, if it has any.
    pub(super) end_point: Option<&'a [u8]>,
}

/// How far an exchange is.
enum Progress {
    Untouched,
    /// A method without proof of the server's was used.
    Answered,
    Scram {
        exchange: Box<ScramSha256>,
        bound: bool,
    },
    /// The server proved that it knows the password.
    Proved {
        bound: bool,
    },
}

/// Whether the server is satisfied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    More,
    Done,
}

/// One authentication exchange.
pub(super) struct Exchange<'a> {
    credentials: Credentials<'a>,
    progress: Progress,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(credentials: Credentials<'a>) -> Self {
        Self { credentials, progress: Progress::Untouched }
    }

    /// Answers a request into `out`.
    ///
    /// # Errors
    /// `denied` without a password, or for a method that is not allowed; `unsupported` for one we do
    /// not speak.
    pub(super) fn answer(&mut self, request: AuthRequest, out: &mut BytesMut) -> Result<Outcome> {
        match request {
            AuthRequest::Ok => return self.finish(),
            AuthRequest::CleartextPassword => {
                self.begin("password")?;
                let password = self.password()?.secret.expose_secret();
                frontend::password_message(password, out).map_err(|e| broken(&e))?;
                self.progress = Progress::Answered;
            }
            AuthRequest::Md5Password { salt } => {
                self.begin("md5")?;
                let password = self.password()?.secret.expose_secret();
                let hash = md5_hash(self.credentials.user.as_bytes(), password, salt);
                frontend::password_message(hash.as_bytes(), out).map_err(|e| broken(&e))?;
                self.progress = Progress::Answered;
            }
            AuthRequest::Sasl { mechanisms } => self.begin_scram(&mechanisms, out)?,
            AuthRequest::SaslContinue(data) => {
                let Progress::Scram { exchange, .. } = &mut self.progress else {
                    return Err(out_of_order());
                };
                exchange.update(&data).map_err(|error| scram_failed(&error))?;
                frontend::sasl_response(exchange.message(), out).map_err(|e| broken(&e))?;
            }
            AuthRequest::SaslFinal(data) => {
                let Progress::Scram { exchange, bound } = &mut self.progress else {
                    return Err(out_of_order());
                };
                exchange.finish(&data).map_err(|error| scram_failed(&error))?;
                self.progress = Progress::Proved { bound: *bound };
            }
            AuthRequest::Unsupported(method) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the server asks for authentication by {method}, which is not supported"
                    ),
                )
                .hint("Let pg_hba.conf ask this client for scram-sha-256 or a certificate."));
            }
        }
        Ok(Outcome::More)
    }

    /// Checks that a challenge by `method` is allowed here and now.
    fn begin(&self, method: &str) -> Result<()> {
        self.credentials.required.check(method)?;
        if !matches!(self.progress, Progress::Untouched) {
            return Err(out_of_order());
        }
        if self.credentials.channel_binding == ChannelBindingMode::Require
            && method != "scram-sha-256"
        {
            return Err(unbound(&format!("the server asks for authentication by '{method}'")));
        }
        Ok(())
    }

    fn begin_scram(&mut self, mechanisms: &[String], out: &mut BytesMut) -> Result<()> {
        let offers = |name: &str| mechanisms.iter().any(|mechanism| mechanism == name);
        if !offers(SCRAM_SHA_256) && !offers(SCRAM_SHA_256_PLUS) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the server offers only authentication by {}", mechanisms.join(", ")),
            )
            .hint("Let pg_hba.conf ask this client for scram-sha-256 or a certificate."));
        }
        self.begin("scram-sha-256")?;
        if offers(SCRAM_SHA_256_PLUS) && !self.credentials.encrypted {
            return Err(Error::new(
                Kind::Denied,
                "the server offers channel binding on a connection without TLS: it is not what it \
                 says it is, or somebody is in between",
            ));
        }
        let mode = self.credentials.channel_binding;
        let wanted = self.credentials.encrypted && mode != ChannelBindingMode::Disable;
        let (mechanism, binding) = match self.credentials.end_point {
            _ if !wanted => (SCRAM_SHA_256, ChannelBinding::unsupported()),
            // We could and the server says it cannot: it will notice if it never said that.
            _ if !offers(SCRAM_SHA_256_PLUS) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            Some(data) => (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(data.to_vec())),
            // To go on unbound is what somebody in between would want, with a certificate of their own.
            None => return Err(unbindable()),
        };
        let bound = mechanism == SCRAM_SHA_256_PLUS;
        if mode == ChannelBindingMode::Require && !bound {
            return Err(unbound("the server or its certificate offers no channel binding"));
        }
        if !offers(mechanism) {
            return Err(unbound("the server accepts nothing without channel binding")
                .hint("Use channel_binding=prefer."));
        }
        let password = self.password()?.secret.expose_secret();
        let exchange = Box::new(ScramSha256::new(password, binding));
        frontend::sasl_initial_response(mechanism, exchange.message(), out)
            .map_err(|error| broken(&error))?;
        self.progress = Progress::Scram { exchange, bound };
        Ok(())
    }

    fn finish(&self) -> Result<Outcome> {
        let bound = match &self.progress {
            Progress::Untouched => {
                self.credentials.required.check("none")?;
                false
            }
            Progress::Answered => false,
            Progress::Scram { .. } => {
                return Err(Error::new(
                    Kind::Denied,
                    "the server ended the authentication without proving that it knows the password",
                ));
            }
            Progress::Proved { bound } => *bound,
        };
        if self.credentials.channel_binding == ChannelBindingMode::Require && !bound {
            return Err(unbound("the server let us in without it"));
        }
        Ok(Outcome::Done)
    }

    fn password(&self) -> Result<&'a Password> {
        self.credentials.password.ok_or_else(|| {
            Error::new(
                Kind::Denied,
                format!(
                    "the server asks for the password of role '{}', and none is known",
                    self.credentials.user
                ),
            )
            .hint(
                "Put it in ~/.pgpass (host:port:database:user:password, mode 0600; for replication \
                 the database is 'replication' or *), in PGPASSWORD, or in the connection string.",
            )
        })
    }
}

fn unbound(why: &str) -> Error {
    Error::new(Kind::Denied, format!("channel binding is required, but {why}"))
        .hint("Use TLS and scram-sha-256 on the server, or channel_binding=prefer.")
}

fn unbindable() -> Error {
    Error::new(
        Kind::Denied,
        "the server offers channel binding, but nothing can be bound to its certificate, whose \
         signature has no hash of its own",
    )
    .hint("Use a certificate signed with RSA or ECDSA on the server, or channel_binding=disable.")
}

fn out_of_order() -> Error {
    Error::new(Kind::Corrupt, "the server's authentication messages come in an impossible order")
}

fn broken(error: &std::io::Error) -> Error {
    Error::new(Kind::Config, format!("unable to send the password: {error}"))
        .hint("A password cannot hold a zero byte.")
}

fn scram_failed(error: &std::io::Error) -> Error {
    let text = error.to_string();
    if text.contains("iteration count") {
        let message = format!(
            "unable to authenticate with SCRAM: the server asks for more than {ITERATIONS_MAX} \
             iterations for this role's password"
        );
        return Error::new(Kind::Unsupported, message).hint(format!(
            "Set scram_iterations on the server to {ITERATIONS_MAX} or less, then set the role's \
             password again."
        ));
    }
    let why = text.strip_prefix("SCRAM error: ").unwrap_or(&text);
    Error::new(Kind::Denied, format!("unable to authenticate with SCRAM: {why}")).hint(
        "Check the password; with channel binding, also that nothing terminates TLS in between.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password() -> Password {
        Password { secret: b"pencil".to_vec().into(), source: "a test".to_owned() }
    }

    fn exchange<'a>(
        password: Option<&'a Password>,
        required: &'a RequiredAuth,
        channel_binding: ChannelBindingMode,
        end_point: Option<&'a [u8]>,
    ) -> Exchange<'a> {
        let encrypted = end_point.is_some();
        let credentials =
            Credentials { user: "u", password, channel_binding, required, encrypted, end_point };
        Exchange::new(credentials)
    }

    /// As [`exchange`], over TLS with a certificate that nothing can be bound to.
    fn unbindable_exchange<'a>(
        password: &'a Password,
        required: &'a RequiredAuth,
        channel_binding: ChannelBindingMode,
    ) -> Exchange<'a> {
        let mut exchange = exchange(Some(password), required, channel_binding, None);
        exchange.credentials.encrypted = true;
        exchange
    }

    fn sasl(names: &[&str]) -> AuthRequest {
        AuthRequest::Sasl { mechanisms: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    fn kind(result: Result<Outcome>) -> Kind {
        result.unwrap_err().kind()
    }

    #[test]
    fn channel_binding_is_used_when_both_sides_can() {
        let (password, any) = (password(), RequiredAuth::parse(None).unwrap());
        let both = [SCRAM_SHA_256_PLUS, SCRAM_SHA_256];
        for (mode, offered, end_point, begins) in [
            (ChannelBindingMode::Prefer, &both[..], Some(&b"hash"[..]), "p=tls-server-end-point,,"),
            (ChannelBindingMode::Prefer, &both[1..], Some(&b"hash"[..]), "y,,"),
            (ChannelBindingMode::Disable, &both[..], Some(&b"hash"[..]), "n,,"),
            (ChannelBindingMode::Prefer, &both[1..], None, "n,,"),
        ] {
            let mut out = BytesMut::new();
            let mut exchange = exchange(Some(&password), &any, mode, end_point);
            assert_eq!(exchange.answer(sasl(offered), &mut out).unwrap(), Outcome::More);
            let sent = String::from_utf8_lossy(&out).into_owned();
            assert!(sent.contains(begins), "{sent:?}");
            assert_eq!(kind(exchange.answer(AuthRequest::Ok, &mut out)), Kind::Denied);
        }
    }

    #[test]
    fn a_certificate_without_a_hash_does_not_take_channel_binding_away() {
        let (password, any) = (password(), RequiredAuth::parse(None).unwrap());
        let both = [SCRAM_SHA_256_PLUS, SCRAM_SHA_256];
        for (mode, offered, begins) in [
            (ChannelBindingMode::Prefer, &both[1..], "y,,"),
            (ChannelBindingMode::Disable, &both[..], "n,,"),
            (ChannelBindingMode::Disable, &both[1..], "n,,"),
        ] {
            let mut out = BytesMut::new();
            let mut exchange = unbindable_exchange(&password, &any, mode);
            assert_eq!(exchange.answer(sasl(offered), &mut out).unwrap(), Outcome::More);
            let sent = String::from_utf8_lossy(&out).into_owned();
            assert!(sent.contains(begins), "{sent:?}");
        }
        for mode in [ChannelBindingMode::Prefer, ChannelBindingMode::Require] {
            let mut out = BytesMut::new();
            let mut exchange = unbindable_exchange(&password, &any, mode);
            let refused = exchange.answer(sasl(&both), &mut out).unwrap_err();
            assert_eq!((refused.kind(), out.len()), (Kind::Denied, 0));
            assert!(refused.hint_text().unwrap().contains("RSA or ECDSA"), "{refused:?}");
        }
    }

    #[test]
    fn required_channel_binding_admits_nothing_else() {
        let (password, any) = (password(), RequiredAuth::parse(None).unwrap());
        for request in [
            AuthRequest::Ok,
            AuthRequest::CleartextPassword,
            AuthRequest::Md5Password { salt: [0; 4] },
            sasl(&[SCRAM_SHA_256]),
        ] {
            let mut out = BytesMut::new();
            let mut exchange =
                exchange(Some(&password), &any, ChannelBindingMode::Require, Some(b"hash"));
            assert_eq!(kind(exchange.answer(request, &mut out)), Kind::Denied);
            assert!(out.is_empty());
        }
    }

    #[test]
    fn too_many_iterations_are_refused_with_what_to_do_about_them() {
        let (password, any) = (password(), RequiredAuth::parse(None).unwrap());
        for (count, refused) in [(ITERATIONS_MAX, false), (ITERATIONS_MAX + 1, true)] {
            let mut out = BytesMut::new();
            let mut exchange = exchange(Some(&password), &any, ChannelBindingMode::Prefer, None);
            exchange.answer(sasl(&[SCRAM_SHA_256]), &mut out).unwrap();
            let sent = String::from_utf8_lossy(&out).into_owned();
            let (_, nonce) = sent.split_once("r=").unwrap();
            let asked = format!("r={nonce}server,s=c2FsdA==,i={count}");
            let answer = exchange.answer(AuthRequest::SaslContinue(asked.into()), &mut out);
            assert_eq!(answer.is_err(), refused, "{count}: {answer:?}");
            if let Err(error) = answer {
                assert_eq!(error.kind(), Kind::Unsupported);
                assert!(error.message().contains("more than 100000 iterations"), "{error}");
                assert!(error.hint_text().unwrap().contains("scram_iterations"), "{error:?}");
            }
        }
    }

    #[test]
    fn channel_binding_offered_without_tls_is_refused() {
        let (password, any) = (password(), RequiredAuth::parse(None).unwrap());
        let mut exchange = exchange(Some(&password), &any, ChannelBindingMode::Prefer, None);
        let offered = sasl(&[SCRAM_SHA_256_PLUS, SCRAM_SHA_256]);
        assert_eq!(kind(exchange.answer(offered, &mut BytesMut::new())), Kind::Denied);
    }

    #[test]
    fn a_missing_password_and_unknown_methods_are_named() {
        let any = RequiredAuth::parse(None).unwrap();
        let mut without = exchange(None, &any, ChannelBindingMode::Prefer, None);
        let error = without.answer(sasl(&[SCRAM_SHA_256]), &mut BytesMut::new()).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(error.hint_text().unwrap().contains(".pgpass"));
        for request in [AuthRequest::Unsupported("GSSAPI"), sasl(&["OAUTHBEARER"])] {
            let mut exchange = exchange(None, &any, ChannelBindingMode::Prefer, None);
            assert_eq!(kind(exchange.answer(request, &mut BytesMut::new())), Kind::Unsupported);
        }
    }

    #[test]
    fn require_auth_allows_and_forbids_methods() {
        let password = password();
        let only_scram = RequiredAuth::parse(Some("scram-sha-256")).unwrap();
        let no_cleartext = RequiredAuth::parse(Some("!password,!none")).unwrap();
        let mut out = BytesMut::new();
        for (required, request, allowed) in [
            (&only_scram, AuthRequest::CleartextPassword, false),
            (&only_scram, AuthRequest::Ok, false),
            (&only_scram, sasl(&[SCRAM_SHA_256]), true),
            (&no_cleartext, AuthRequest::CleartextPassword, false),
            (&no_cleartext, AuthRequest::Ok, false),
            (&no_cleartext, AuthRequest::Md5Password { salt: [1; 4] }, true),
        ] {
            let mut exchange =
                exchange(Some(&password), required, ChannelBindingMode::Prefer, None);
            assert_eq!(exchange.answer(request, &mut out).is_ok(), allowed);
        }
        for bad in ["nope", "md5,!password", "md5,md5", ""] {
            assert!(RequiredAuth::parse(Some(bad)).is_err(), "{bad}");
        }
    }
}
