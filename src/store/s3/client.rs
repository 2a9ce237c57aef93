//! The SDK's client, set up by our options.
//!
//! The SDK signs, resolves credentials (environment, profile, web identity, container, instance) and
//! corrects its clock by the server's; it does not retry, compute checksums or time out by itself:
//! those live in `attempt` and `upload`, once.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::region::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::{ConfigLoader, SdkConfig};
use aws_sdk_s3::config::endpoint::{EndpointFuture, Params, ResolveEndpoint};
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Credentials, IdentityCache, Intercept, Region,
    RequestChecksumCalculation, ResponseChecksumValidation, RuntimeComponents, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_smithy_http_client::{Builder, tls};
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextRef;
use aws_smithy_types::retry::RetryConfig;
use aws_smithy_types::timeout::TimeoutConfig;
use jiff::{SignedDuration, Timestamp};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::ExposeSecret;

use crate::clock::{Clock, Instant};
use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::store::{Addressing, CREDENTIALS_HINT, StaticCredentials, StoreOptions};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections kept open for the next request.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// Connections unused for this long are closed by us: servers and the boxes between do it at 60 s and
/// more without a word.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);

/// A file of certificates larger than this is not read: a hundred times those of all public authorities.
const CA_FILE_BYTES_MAX: u64 = 32 << 20;

/// Region signed for when nobody says which.
const DEFAULT_REGION: &str = "us-east-1";

/// Credentials that the server refused are looked for anew no more often than this.
const RENEWAL_PAUSE: Duration = Duration::from_secs(60);

/// A client and what we need to know about its endpoint.
#[derive(Debug)]
pub(super) struct Client {
    sdk: RwLock<aws_sdk_s3::Client>,
    http: SharedHttpClient,
    clock: Clock,
    /// When credentials were last looked for anew.
    renewed: tokio::sync::Mutex<Option<Instant>>,
    /// Over TLS the body needs no signature: TLS protects it and a CRC finds what TLS does not.
    pub(super) tls: bool,
    pub(super) skew: Arc<Skew>,
}

impl Client {
    pub(super) async fn connect(options: &StoreOptions, clock: &Clock) -> Result<Self> {
        let http = http_client(options)?;
        let shared = loader(options, &http).region(region(options, &http)).load().await;
        let endpoint = match &options.endpoint {
            Some(endpoint) => Some(endpoint.clone()),
            None => configured_endpoint(&shared).await,
        };
        if let Some(endpoint) = &endpoint {
            check_endpoint(endpoint)?;
        }
        let path_style = match options.addressing {
            Addressing::Path => true,
            Addressing::VirtualHost => false,
            Addressing::Auto => endpoint.is_some(),
        };
        let skew = Arc::new(Skew { clock: clock.clone(), last: Mutex::new(None) });
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(path_style)
            .interceptor(SkewMeter(Arc::clone(&skew)));
        config.set_endpoint_url(endpoint.clone());
        let config = config.build();
        Ok(Self {
            sdk: RwLock::new(aws_sdk_s3::Client::from_conf(config)),
            http,
            clock: clock.clone(),
            renewed: tokio::sync::Mutex::default(),
            tls: endpoint.is_none_or(|endpoint| endpoint.starts_with("https://")),
            skew,
        })
    }

    pub(super) fn sdk(&self) -> aws_sdk_s3::Client {
        self.sdk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks for the credentials anew, which the SDK reads from a profile once and keeps for ever. Whether
    /// they may be others by now than those that the try at `begun` was refused with.
    pub(super) async fn renew_credentials(&self, options: &StoreOptions, begun: Instant) -> bool {
        if options.credentials.is_some() {
            return false;
        }
        let mut renewed = self.renewed.lock().await;
        let now = self.clock.instant();
        match *renewed {
            Some(last) if last >= begun => return true,
            Some(last) if now < last + RENEWAL_PAUSE => return false,
            _ => *renewed = Some(now),
        }
        let config = self.sdk().config().clone();
        let shared = loader(options, &self.http).region(config.region().cloned()).load().await;
        let mut config = config.to_builder();
        config.set_credentials_provider(shared.credentials_provider());
        config.set_identity_cache(IdentityCache::lazy().build());
        let client = aws_sdk_s3::Client::from_conf(config.build());
        *self.sdk.write().unwrap_or_else(PoisonError::into_inner) = client;
        true
    }
}

/// What the SDK is to look up, but for the region.
fn loader(options: &StoreOptions, http: &SharedHttpClient) -> ConfigLoader {
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http.clone())
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(profile) = &options.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(endpoint) = &options.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    if let Some(credentials) = &options.credentials {
        loader = loader.credentials_provider(fixed(credentials));
    }
    loader
}

/// The endpoint that the environment or the profile names, for S3 or for all services.
///
/// Nobody but the SDK knows all the places and which goes first, and it says so to a resolver of
/// endpoints only, when a request is made. So one is made, which fails there: nothing is sent.
async fn configured_endpoint(shared: &SdkConfig) -> Option<String> {
    let asked = AskedEndpoint::default();
    let config = aws_sdk_s3::config::Builder::from(shared)
        .credentials_provider(Credentials::new("nobody", "nothing", None, None, "endpoint"))
        .endpoint_resolver(asked.clone())
        .build();
    let request = aws_sdk_s3::Client::from_conf(config).head_bucket().bucket("bucket").send();
    // It cannot succeed; what it was to be sent to is all that is wanted.
    let _ = Box::pin(request).await;
    asked.0.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Takes a note of the endpoint that is set, and resolves none.
#[derive(Clone, Debug, Default)]
struct AskedEndpoint(Arc<Mutex<Option<String>>>);

impl ResolveEndpoint for AskedEndpoint {
    fn resolve_endpoint<'a>(&'a self, params: &'a Params) -> EndpointFuture<'a> {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *asked = params.endpoint().map(str::to_owned);
        EndpointFuture::ready(Err("only asked for".into()))
    }
}

/// Refuses what is no URL of a server, or holds a secret.
pub(super) fn check_endpoint(endpoint: &str) -> Result<()> {
    let refused = |flaw: &str| {
        Error::new(Kind::Config, format!("unable to use '{endpoint}' as the endpoint: {flaw}"))
            .hint("Write it as https://HOST or https://HOST:PORT.")
    };
    // Not echoed, for it may hold a secret; nor is it left to the parser, which may take a secret for
    // the scheme or the fragment.
    if endpoint.contains('@') {
        let message = "unable to use an endpoint with a user name in it";
        return Err(Error::new(Kind::Config, message).hint(CREDENTIALS_HINT));
    }
    let url = url::Url::parse(endpoint).map_err(|error| refused(&error.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(()),
        _ => Err(refused("it is not an http or https URL")),
    }
}

fn fixed(credentials: &StaticCredentials) -> Credentials {
    Credentials::new(
        &credentials.access_key_id,
        credentials.secret_access_key.expose_secret(),
        credentials.session_token.as_ref().map(|token| token.expose_secret().to_owned()),
        None,
        "configuration",
    )
}

/// The region from the options, the environment, the profile, and on AWS the instance. A server that
/// is not AWS is not asked of an instance's metadata service, which would only take time.
fn region(options: &StoreOptions, http: &SharedHttpClient) -> RegionProviderChain {
    let mut profile = ProfileFileRegionProvider::builder();
    if let Some(name) = &options.profile {
        profile = profile.profile_name(name);
    }
    let chain = RegionProviderChain::first_try(options.region.clone().map(Region::new))
        .or_else(EnvironmentVariableRegionProvider::new())
        .or_else(profile.build());
    let chain = if options.endpoint.is_none() {
        let provider = ProviderConfig::without_region().with_http_client(http.clone());
        chain.or_else(ImdsRegionProvider::builder().configure(&provider).build())
    } else {
        chain
    };
    chain.or_else(DEFAULT_REGION)
}

fn http_client(options: &StoreOptions) -> Result<SharedHttpClient> {
    let mut trusted = tls::TrustStore::default();
    if let Some(path) = &options.ca_file {
        let attempted = || format!("unable to trust the certificates in '{}'", path.display());
        let pem = file::read(path, CA_FILE_BYTES_MAX);
        let pem = pem.context(attempted).map_err(|e| e.with_kind(Kind::Config))?;
        check_certificates(&pem).map_err(|flaw| {
            Error::new(Kind::Config, flaw)
                .context(attempted())
                .hint("The file must hold one or more certificates in PEM form.")
        })?;
        trusted = trusted.with_pem_certificate(pem);
    }
    let refused = |error: &dyn std::fmt::Display| {
        Error::new(Kind::Config, format!("unable to set up TLS for the store: {error}"))
    };
    let context = tls::TlsContext::builder()
        .with_trust_store(trusted)
        .build()
        .map_err(|error| refused(&error))?;
    Ok(Builder::new()
        .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
        .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
        .tls_context(context)
        .build_https())
}

/// The SDK panics over certificates that it cannot read, so they are read here first.
fn check_certificates(pem: &[u8]) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        store.add(certificate).map_err(|error| error.to_string())?;
    }
    if store.is_empty() { Err("there is no certificate in it".to_owned()) } else { Ok(()) }
}

/// The server's clock minus ours, as of its last answer.
#[derive(Debug)]
pub(super) struct Skew {
    clock: Clock,
    last: Mutex<Option<SignedDuration>>,
}

impl Skew {
    pub(super) fn last(&self) -> Option<SignedDuration> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the `Date` of every answer. It is cut to the second, which half a second makes up for.
#[derive(Debug)]
struct SkewMeter(Arc<Skew>);

impl Intercept for SkewMeter {
    fn name(&self) -> &'static str {
        "SkewMeter"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _bag: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let date = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok());
        if let Some(date) = date.map(|date| date.timestamp()) {
            let skew = half_second_later(date).duration_since(self.0.clock.now());
            *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(skew);
        }
        Ok(())
    }
}

fn half_second_later(time: Timestamp) -> Timestamp {
    time.checked_add(SignedDuration::from_millis(500)).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The SDK panics when a provider of the chain lacks its client, so every way through is walked.
    #[tokio::test]
    async fn clients_for_aws_and_for_others_are_set_up_whatever_is_known() {
        let keys = || {
            Some(StaticCredentials {
                access_key_id: "key".to_owned(),
                secret_access_key: "secret".to_owned().into(),
                session_token: None,
            })
        };
        let endpoint = || Some("http://127.0.0.1:9".to_owned());
        let region = || Some("eu-central-1".to_owned());
        for options in [
            StoreOptions { credentials: keys(), ..StoreOptions::default() },
            StoreOptions { region: region(), ..StoreOptions::default() },
            StoreOptions { endpoint: endpoint(), ..StoreOptions::default() },
            StoreOptions { profile: Some("nobody".to_owned()), ..StoreOptions::default() },
        ] {
            let client = Client::connect(&options, &Clock::system()).await.unwrap();
            let region = client.sdk().config().region().map(ToString::to_string).unwrap();
            assert_eq!(client.tls, options.endpoint.is_none());
            assert!(options.region.is_none_or(|expected| expected == region));
        }
    }
}
